"""Component calls that run out of memory, run again once there is room for them.

A call is a pure function, so nobody but the engine learns of it. What is tried, and in which order, is the ladder's to
say; it begins after the exception is gone, because a live exception pins every tensor of its frames.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from denoised.errors import DeviceOutOfMemoryError

from . import exhaustion, host_memory, meter, pieces
from .inputs import Inputs
from .ladder import APART, NOTHING, Climb, Rung
from .memory_counts import MemoryCounts
from .room import Room
from .seam import Method
from .workspace import Workspace

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trial:
    """A component's computation for one request or several, of so many samples; `compute` may be called again.

    `is_exact` says that a request was promised the bits of a run alone.
    """

    method: Method
    requests: int
    rows: int
    inputs: Inputs
    is_exact: bool
    compute: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Tried:
    """What a computation returned or raised, and the rung without which it would have failed.

    `apart` says of such an error that there is no memory for all requests together, and how to go on with fewer.
    """

    value: Any = None
    error: BaseException | None = None
    helped: Rung | None = None
    apart: Rung | None = None


class Recovery:
    """Runs computations, and counts those that ran out of memory, by the rung that helped them."""

    def __init__(
        self,
        device: torch.device,
        *,
        counts: MemoryCounts | None = None,
        room: Room | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        self._device, self._counts = device, counts or MemoryCounts()
        self._room, self._workspace = room, workspace

    def run(self, trial: Trial) -> Tried:
        if self._workspace is None:
            tried, needed = self._attempt(trial)
        else:
            with self._workspace.entered(trial.method, trial.inputs, trial.rows) as stay:
                tried, needed = self._attempt(trial)
                stay.failed, stay.lacking = tried.error is not None, needed
        return self._climb(trial, needed) if needed is not None else tried

    def most(self, method: Method, inputs: Inputs, rows: Sequence[int]) -> int:
        """How many of these calls, of which the first has these inputs, are to run as one; one at least."""
        return self._workspace.most(method, inputs, rows) if self._workspace is not None else len(rows)

    def helped(self, method: Method, rung: Rung) -> None:
        self._counts.recovered(rung)
        logger.info("%s ran out of memory and came through: %s", method, rung)

    def _climb(self, trial: Trial, needed: int) -> Tried:
        module, inputs = trial.method.module, trial.inputs
        climb = Climb(
            requests=trial.requests,
            can_slice=pieces.can_slice(module) and trial.rows > 1,
            can_tile=next(self._tilings(trial), None) is not None,
            is_exact=trial.is_exact,
            can_evict=self._room is not None,
            can_offload=self._room is not None,
        )
        rungs: list[Rung] = []
        while (rung := climb.next(rungs)) is not None and inputs.restore():
            if rung in APART:
                return Tried(error=_failure(trial, needed, rungs), apart=rung)
            rungs.append(rung)
            for way in self._ways(rung, trial, needed):
                with way:
                    tried, needed_now = self._attempt(trial)
                if tried.error is None:
                    self.helped(trial.method, rung)
                    return Tried(tried.value, helped=rung)
                if needed_now is None:
                    return tried
                needed = max(needed, needed_now)
        self._counts.recovered(NOTHING)
        return Tried(error=_failure(trial, needed, rungs))

    def _attempt(self, trial: Trial) -> tuple[Tried, int | None]:
        """Computes; when memory runs out, also says what was needed at least: what was taken then, and asked for."""
        before = meter.taken_bytes(self._device)
        try:
            return Tried(trial.compute()), None
        except BaseException as error:  # whatever it is, it is the request's: this thread serves others too
            tried, needed = Tried(error=error), None
            if exhaustion.is_out_of_memory(error):
                needed = max(0, meter.taken_bytes(self._device) - before) + exhaustion.asked_bytes(error)
                # The frames would keep what was computed so far.
                error.__cause__ = error.__context__ = None
                error.with_traceback(None)
        return tried, needed

    def _ways(self, rung: Rung, trial: Trial, needed: int) -> Iterator[AbstractContextManager[None]]:
        """Does what the rung does, and yields what to run the computation in."""
        module = trial.method.module
        match rung:
            case Rung.FREE_CACHES:
                gc.collect()
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                host_memory.trim()
                yield nullcontext()
            case Rung.EVICT_IDLE:
                if self._room is not None and self._room.evict_idle(needed):
                    yield nullcontext()
            case Rung.OFFLOAD:
                if self._room is not None and self._room.offload(module):
                    yield nullcontext()
            case Rung.SLICE:
                yield pieces.sliced(module)
            case Rung.TILE:
                yield from self._tilings(trial)

    def _tilings(self, trial: Trial) -> Iterator[AbstractContextManager[None]]:
        return pieces.tilings(trial.method.module, trial.inputs.side, of_latents=trial.method.name == "decode")


def _failure(trial: Trial, needed: int, rungs: list[Rung]) -> DeviceOutOfMemoryError:
    hint = "Ask for fewer or smaller images, or unload a pipeline."
    if trial.is_exact and hasattr(trial.method.module, "use_tiling"):
        hint = "Let the request be batched: what needs not be exact to the bit can be computed in pieces. " + hint
    return DeviceOutOfMemoryError(
        f"The device ran out of memory in {trial.method}, which needs at least {needed:,} bytes beside the weights.",
        hint=hint,
        retry_after=1.0,
        metadata={
            "needed_bytes": str(needed),
            "method": str(trial.method),
            "tried": ",".join(rungs),
        },
    )

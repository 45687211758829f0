"""Component calls that run out of memory, run again once there is room for them.

A call is a pure function, so nobody but the engine learns of it. What is tried, and in which order, is the ladder's to
say; it begins after the exception is gone, because a live exception pins every tensor of its frames.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from denoised.errors import DeviceOutOfMemoryError

from . import exhaustion, host_memory, meter, pieces
from .inputs import Inputs
from .ladder import APART, NOTHING, Climb, Rung
from .memory_counts import MemoryCounts
from .room import Room
from .seam import Method
from .trial import Trial, Tried
from .workspace import Workspace

logger = logging.getLogger(__name__)


class Recovery:
    """Runs computations, and counts those that ran out of memory, by the rung that helped them.

    `clear` lets go of what is only kept to save time.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        counts: MemoryCounts | None = None,
        room: Room | None = None,
        workspace: Workspace | None = None,
        clear: Callable[[], None] = lambda: None,
    ) -> None:
        self._device, self._counts = device, counts or MemoryCounts()
        self._room, self._workspace, self._clear = room, workspace, clear

    def run(self, trial: Trial) -> Tried:
        tried = self._attempt(trial) if self._workspace is None else self._workspace.run(trial, self._attempt)
        return tried if tried.lacking is None else self._climb(trial, tried.lacking)

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
                    tried = self._attempt(trial)
                if tried.error is None:
                    self.helped(trial.method, rung)
                    return Tried(tried.value, helped=rung)
                if tried.lacking is None:
                    return tried
                needed = max(needed, tried.lacking)
        self._counts.recovered(NOTHING)
        return Tried(error=_failure(trial, needed, rungs))

    def _attempt(self, trial: Trial) -> Tried:
        """Computes; when memory runs out, what is lacking is what was taken then, and asked for."""
        before = meter.taken_bytes(self._device)
        try:
            return Tried(trial.compute())
        except BaseException as error:  # whatever it is, it is the request's: this thread serves others too
            tried = Tried(error=error)
            if exhaustion.is_out_of_memory(error):
                lacking = max(0, meter.taken_bytes(self._device) - before) + exhaustion.asked_bytes(error)
                tried = Tried(error=error, lacking=lacking)
                # The frames would keep what was computed so far.
                error.__cause__ = error.__context__ = None
                error.with_traceback(None)
        return tried

    def _ways(self, rung: Rung, trial: Trial, needed: int) -> Iterator[AbstractContextManager[None]]:
        """Does what the rung does, and yields what to run the computation in."""
        module = trial.method.module
        match rung:
            case Rung.FREE_CACHES:
                self._clear()
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

"""What component calls compute in: how much each will take, and that it is there when it begins."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence

import torch
from denoised.errors import NoRoomError
from torch import nn

from . import meter
from .device_memory import DeviceMemory
from .inputs import Inputs
from .ledger import Ledger
from .memory_counts import MemoryCounts
from .meter import Meter
from .room import Room
from .seam import Method
from .trial import Trial, Tried
from .working_sets import Kind, WorkingSets, bucket

# Less than this is neither looked for nor booked.
SMALL_BYTES = 16 << 20


class Workspace:
    """Books what calls work in, and learns how much that is. For the engine's thread."""

    def __init__(
        self,
        device: torch.device,
        ledger: Ledger,
        memory: DeviceMemory,
        room: Room,
        counts: MemoryCounts,
    ) -> None:
        self._device, self._ledger, self._memory = device, ledger, memory
        self._room, self._counts = room, counts
        self._sets = WorkingSets()
        self._labels: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()

    def most(self, method: Method, inputs: Inputs, rows: Sequence[int]) -> int:
        """How many of these calls, of which the first has these inputs, there is room for together; one at least."""
        kind, now = self._kind(method, inputs), time.monotonic()
        if self._sets.estimate(kind, sum(rows), now) < SMALL_BYTES:
            return len(rows)
        return self._sets.most(kind, rows, self._room_bytes, now)

    def run(self, trial: Trial, attempt: Callable[[Trial], Tried]) -> Tried:
        """Makes an attempt. What is idle leaves for it, and no load takes what it works in."""
        kind, rows, now = self._kind(trial.method, trial.inputs), trial.rows, time.monotonic()
        estimate = self._sets.estimate(kind, rows, now)
        claim = self._claim(estimate) if estimate >= SMALL_BYTES else None
        is_measured = self._sets.is_due(kind, rows) and meter.can_measure(self._device)
        try:
            if not is_measured:
                tried = attempt(trial)
            else:
                with Meter(self._device) as gauge:
                    tried = attempt(trial)
                if tried.error is None:
                    self._sets.measured(kind, rows, gauge.peak_bytes)
                    self._counts.estimated("working_set", estimate, gauge.peak_bytes)
        finally:
            if claim is not None:
                self._ledger.give_back(claim)
        if tried.lacking is not None:
            self._sets.exhausted(kind, rows, tried.lacking, now)
        return tried

    def _claim(self, size: int) -> int:
        if (short := size - self._room_bytes) > 0:
            self._room.evict_idle(short, reason="room")
        try:
            return self._ledger.claim(size)
        except NoRoomError:
            # It is tried all the same: an estimate is no reason to refuse anybody.
            return self._ledger.claim_rest(size)

    @property
    def _room_bytes(self) -> int:
        """What one more call may take."""
        free = self._memory.free_bytes
        if self._device.type == "cuda":
            free += self._memory.cached_bytes
        return max(0, min(self._ledger.working_room_bytes, free - self._ledger.headroom_bytes))

    def _kind(self, method: Method, inputs: Inputs) -> Kind:
        module = method.module
        if (label := self._labels.get(module)) is None:
            # By its size too, so that what was learned outlives the module.
            size = sum(parameter.numel() for parameter in module.parameters())
            label = self._labels[module] = f"{type(module).__name__} {size}"
        return Kind(label, method.name, bucket(inputs.row_bytes), inputs.dtype)

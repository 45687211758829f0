"""Which workers are started anew because of memory that is in no book. Policy only: the time is an argument."""

from __future__ import annotations

import math

from .messages import Snapshot

# For so long it has to be idle, and too much: garbage is collected in its own time. Seconds.
PATIENCE_SECONDS = 5.0
# Between two times for one worker: where the limit is too low, its pipelines would be loaded over and over. Seconds.
PAUSE_SECONDS = 600.0


class Recycling:
    """`limit` is in bytes, or as a share of the device's memory; 0 is for never."""

    def __init__(self, limit: int | float) -> None:
        self._limit = limit
        self._since: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def is_due(self, worker: str, snapshot: Snapshot | None, *, is_idle: bool, now: float) -> bool:
        """Whether it is time to; to be asked every now and then. Counts as done where it says so."""
        if not is_idle or snapshot is None or not self._is_too_much(snapshot):
            self._since.pop(worker, None)
            return False
        since = self._since.setdefault(worker, now)
        if now - since < PATIENCE_SECONDS or now - self._last.get(worker, -math.inf) < PAUSE_SECONDS:
            return False
        self._last[worker] = now
        del self._since[worker]
        return True

    def _is_too_much(self, snapshot: Snapshot) -> bool:
        limit = self._limit * snapshot.total_bytes if isinstance(self._limit, float) else self._limit
        return 0 < limit < snapshot.memory.unaccounted_bytes

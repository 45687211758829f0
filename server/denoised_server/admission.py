"""Admission: how many requests may run on a worker, and who of the others is next."""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

from denoised.errors import QueueFullError

T = TypeVar("T", bound=Hashable)

# How many finished requests the estimate of a full queue's waiting time looks back on.
RECENT = 32
MIN_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 60.0


class Admission(Generic[T]):
    """A bounded queue before a bounded set. Higher priority first, then first come, first served."""

    def __init__(self, *, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._running: dict[T, float] = {}
        self._alone: set[T] = set()
        self._waiting: list[tuple[int, int, T]] = []
        self._arrivals = itertools.count()
        self._durations: deque[float] = deque(maxlen=RECENT)

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    def add(self, ticket: T, *, priority: int = 0, alone: bool = False, again: bool = False) -> None:
        """Puts a ticket in line; `admit` says when it may run.

        One that is to run `alone` runs with nothing beside it; one that comes `again` was admitted before, and is not
        refused.
        """
        is_full = len(self._running) >= self._max_running and len(self._waiting) >= self._max_waiting
        if is_full and not again:
            raise QueueFullError(
                f"{len(self._waiting)} requests are waiting already.",
                hint="Try again later, or raise the daemon's setting max_waiting.",
                retry_after=self._retry_after(),
            )
        bisect.insort(self._waiting, (-priority, next(self._arrivals), ticket))
        if alone:
            self._alone.add(ticket)

    def admit(self, now: float) -> list[T]:
        """Takes out of the line who may run from now on."""
        admitted: list[T] = []
        for _, _, ticket in self._waiting:
            if not self._has_room_for(ticket):
                break
            self._running[ticket] = now
            admitted.append(ticket)
        del self._waiting[: len(admitted)]
        return admitted

    def _has_room_for(self, ticket: T) -> bool:
        if self._running and (ticket in self._alone or not self._alone.isdisjoint(self._running)):
            return False
        return len(self._running) < self._max_running

    def release(self, ticket: T, now: float) -> None:
        """Forgets a ticket that has finished, or that does not want to wait any longer."""
        self._alone.discard(ticket)
        if ticket in self._running:
            self._durations.append(now - self._running.pop(ticket))
        else:
            self._waiting = [entry for entry in self._waiting if entry[2] != ticket]

    def positions(self) -> dict[T, int]:
        """Everybody in line, with the number of tickets before it."""
        return {ticket: position for position, (_, _, ticket) in enumerate(self._waiting)}

    def _retry_after(self) -> float:
        if not self._durations:
            return MIN_RETRY_SECONDS
        mean = sum(self._durations) / len(self._durations)
        # One place in line is free once as many requests as run now have moved up by one.
        return min(max(mean / self._max_running, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)

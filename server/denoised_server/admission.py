"""Admission: how many requests may run on a worker, and who of the others is next."""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from denoised.errors import QueueFullError

from .fair_share import FairShare
from .forecast import UNKNOWN, Cost

T = TypeVar("T", bound=Hashable)

# How many finished requests the estimate of a full queue's waiting time looks back on.
RECENT = 32
MIN_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class _Running:
    client: str
    began: float
    cost: Cost


@dataclass(frozen=True, slots=True)
class _Place(Generic[T]):
    """A place in line. `limit` is how many of the client's tickets may run at a time; None is no limit of its own."""

    priority: int
    tick: int
    arrival: int
    ticket: T
    client: str
    limit: int | None
    cost: Cost

    @property
    def order(self) -> tuple[int, int, int]:
        return -self.priority, self.tick, self.arrival


class Admission(Generic[T]):
    """A bounded queue before a bounded set. Higher priority first, then clients by turns, then by arrival."""

    def __init__(self, *, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._running: dict[T, _Running] = {}
        self._alone: set[T] = set()
        self._waiting: list[_Place[T]] = []
        self._arrivals = itertools.count()
        self._shares: dict[int, FairShare] = {}
        self._durations: deque[float] = deque(maxlen=RECENT)

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    def add(
        self,
        ticket: T,
        *,
        priority: int = 0,
        client: str = "",
        limit: int | None = None,
        alone: bool = False,
        again: bool = False,
        cost: Cost = UNKNOWN,
    ) -> None:
        """Puts a ticket in line; `admit` says when it may run.

        `cost` is what is known of how long it will run. One that is to run `alone` runs with nothing beside it; one
        that comes `again` was admitted before, and is not refused.
        """
        is_full = len(self._running) >= self._max_running and len(self._waiting) >= self._max_waiting
        if is_full and not again:
            raise QueueFullError(
                f"{len(self._waiting)} requests are waiting already.",
                hint="Try again later, or raise the daemon's setting max_waiting.",
                retry_after=self._retry_after(),
            )
        share = self._shares.setdefault(priority, FairShare())
        place = _Place(priority, share.start(client), next(self._arrivals), ticket, client, limit, cost)
        bisect.insort(self._waiting, place, key=lambda place: place.order)
        if alone:
            self._alone.add(ticket)

    def admit(self, now: float) -> list[T]:
        """Takes out of the line who may run from now on."""
        running = Counter(each.client for each in self._running.values())
        admitted: list[_Place[T]] = []
        for place in self._waiting:
            if not self._has_room_for(place.ticket):
                break
            if place.limit is None or running[place.client] < place.limit:
                running[place.client] += 1
                self._running[place.ticket] = _Running(place.client, now, place.cost)
                admitted.append(place)
        for place in admitted:
            self._waiting.remove(place)
            self._shares[place.priority].serve(place.tick)
        if not self._waiting:
            # Nobody is ahead of anybody any more.
            self._shares.clear()
        return [place.ticket for place in admitted]

    def _has_room_for(self, ticket: T) -> bool:
        if self._running and (ticket in self._alone or not self._alone.isdisjoint(self._running)):
            return False
        return len(self._running) < self._max_running

    def release(self, ticket: T, now: float) -> None:
        """Forgets a ticket that has finished, or that does not want to wait any longer."""
        self._alone.discard(ticket)
        if ticket in self._running:
            self._durations.append(now - self._running.pop(ticket).began)
        else:
            self._waiting = [place for place in self._waiting if place.ticket != ticket]

    def positions(self) -> dict[T, int]:
        """Everybody in line, with the number of tickets before it."""
        return {place.ticket: position for position, place in enumerate(self._waiting)}

    def waits(self, now: float) -> dict[T, float]:
        """How long everybody in line is expected to wait, as far as that is known of those before them."""
        starts = self._starts(now, [place.cost for place in self._waiting])
        return {place.ticket: start for place, start in zip(self._waiting, starts, strict=False)}

    def wait_of_next(self, now: float, *, priority: int = 0, client: str = "") -> float:
        """How long a ticket that came now would have to wait; 0 where that is not known."""
        tick = self._shares[priority].due(client) if priority in self._shares else 0
        ahead = [place.cost for place in self._waiting if place.order[:2] <= (-priority, tick)]
        starts = self._starts(now, [*ahead, UNKNOWN])
        return starts[-1] if len(starts) > len(ahead) else 0.0

    def _starts(self, now: float, costs: list[Cost]) -> list[float]:
        """When those with these costs start one after the other, in seconds from now, until one cannot be known."""
        mean = self._mean()
        free = [0.0] * (self._max_running - len(self._running))
        for running in self._running.values():
            usual = running.cost.usual if running.cost.usual is not None else mean
            if usual is not None:
                free.append(max(0.0, running.began + usual - now))
        heapq.heapify(free)
        starts: list[float] = []
        for cost in costs:
            if not free:
                break
            starts.append(start := heapq.heappop(free))
            usual = cost.usual if cost.usual is not None else mean
            if usual is not None:
                heapq.heappush(free, start + usual)
        return starts

    def _mean(self) -> float | None:
        return sum(self._durations) / len(self._durations) if self._durations else None

    def _retry_after(self) -> float:
        mean = self._mean()
        if mean is None:
            return MIN_RETRY_SECONDS
        # One place in line is free once as many requests as run now have moved up by one.
        return min(max(mean / self._max_running, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)

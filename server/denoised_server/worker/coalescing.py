"""Which component calls are pending, and which run next. Policy only: what a call computes is not its business."""

from __future__ import annotations

import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

from .batch_times import BatchTimes
from .fairness import Entrant, Fairness

T = TypeVar("T")

# Every so many batches the call that has waited longest leads, whatever else is to be said: nothing starves.
OLDEST_EVERY = 32
# A request is urgent when its deadline leaves less than so many times the device seconds that it needs: others run too.
URGENT = 2.0
# Kinds of call whose times are remembered.
KINDS = 1024


class Stop(StrEnum):
    """Why a batch is not larger."""

    UNMATCHED = "unmatched"
    FULL = "full"
    TIMES = "times"


@dataclass(slots=True, eq=False)
class Pending(Generic[T]):
    """One call that a request waits for.

    `key` says which calls it may be joined with: those with an equal one. None stands alone. `entrants` are those who
    wait for it, at least one; they may become fewer. `rows` is how many samples it has.
    """

    call: T
    key: Hashable | None
    entrants: Sequence[Entrant]
    rows: int = 1
    arrival: int = 0


@dataclass(slots=True)
class Coalescing(Generic[T]):
    """Pending calls of the requests that take turns on a device.

    Who leads the next batch: the highest priority, then urgent deadlines, the earliest first, then whoever has had the
    least of the device. Calls that fit the leader come along in the same order, whatever their priority, as many as
    make the device faster in all: joining costs the leader little, and waiting would cost the others a batch of their
    own. Nothing ever waits for partners.

    `stops` counts batches by why they were not larger: no other pending call fitted, `max_joined`, or parts were
    measured to be faster, or the whole too slow for a deadline.
    """

    max_joined: int
    stops: Counter[Stop] = field(default_factory=lambda: Counter(dict.fromkeys(Stop, 0)))
    _waiting: list[Pending[T]] = field(default_factory=list)
    _fairness: Fairness = field(default_factory=Fairness)
    _times: OrderedDict[Hashable, BatchTimes] = field(default_factory=OrderedDict)
    _arrivals: Iterator[int] = field(default_factory=itertools.count)
    _batches: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, entrant: Entrant) -> None:
        """A request begins; calls of it may be added from now on."""
        self._fairness.enter(entrant)

    def leave(self, entrant: Entrant) -> None:
        """A request has ended, and has no call pending."""
        self._fairness.leave(entrant)

    def add(self, pending: Pending[T]) -> None:
        pending.arrival = next(self._arrivals)
        self._waiting.append(pending)

    def put_back(self, batch: list[Pending[T]]) -> None:
        """Calls that were taken and do not run yet: where they stood before."""
        self._waiting += batch

    def discard(self, pending: Pending[T]) -> bool:
        """Forgets a call that nobody waits for any more; says whether it was still there."""
        if pending not in self._waiting:
            return False
        self._waiting.remove(pending)
        return True

    def next(self, now: float) -> list[Pending[T]]:
        """Takes out the calls that run next, as one batch; empty when none is pending."""
        if len(self._waiting) < 2:
            batch, self._waiting = self._waiting, []
            self.stops[Stop.UNMATCHED] += len(batch)
            return batch
        if next(self._batches) % OLDEST_EVERY == 0:
            lead = min(self._waiting, key=lambda pending: pending.arrival)
        else:
            lead = min(self._waiting, key=lambda pending: self._order(pending, now))
        batch, stop = self._join(lead, now)
        self.stops[stop] += 1
        taken = {id(pending) for pending in batch}
        self._waiting = [pending for pending in self._waiting if id(pending) not in taken]
        return batch

    def _join(self, lead: Pending[T], now: float) -> tuple[list[Pending[T]], Stop]:
        """The leader and those that come along, and why no more of them."""
        batch = [lead]
        if lead.key is None:
            return batch, Stop.UNMATCHED
        stop = Stop.UNMATCHED
        fitting = [pending for pending in self._waiting if pending.key == lead.key and pending is not lead]
        fitting.sort(key=lambda pending: self._order(pending, now))
        room = self.max_joined - len(lead.entrants)
        for pending in fitting:
            room -= len(pending.entrants)
            if room < 0:
                stop = Stop.FULL
                break
            batch.append(pending)
        if times := self._times.get(lead.key):
            patience = min(_patience(entrant, now) for entrant in lead.entrants)
            count = times.count([pending.rows for pending in batch], patience)
            if count < len(batch):
                return batch[:count], Stop.TIMES
        return batch, stop

    def ran(self, batch: list[Pending[T]], seconds: float, *, as_one: bool) -> None:
        """Says what a batch took on the device, and whether it ran as one."""
        rows = sum(pending.rows for pending in batch)
        for pending in batch:
            for entrant in pending.entrants:
                self._fairness.charge(entrant, seconds * pending.rows / rows / len(pending.entrants))
        key = batch[0].key
        if as_one and key is not None:
            self._times.setdefault(key, BatchTimes()).learn(rows, seconds)
            self._times.move_to_end(key)
            if len(self._times) > KINDS:
                self._times.popitem(last=False)

    def worth(self, key: Hashable, rows: Sequence[int]) -> int:
        """How many calls with so many samples each are worth joining, of those given."""
        times = self._times.get(key)
        return times.count(rows) if times else len(rows)

    def _order(self, pending: Pending[T], now: float) -> tuple[float, ...]:
        times = self._times.get(pending.key)
        cost = times.estimate(pending.rows) if times else 0.0
        cost /= len(pending.entrants)
        return *min(self._rank(entrant, cost, now) for entrant in pending.entrants), pending.arrival

    def _rank(self, entrant: Entrant, cost: float, now: float) -> tuple[float, ...]:
        deadline = math.inf
        if entrant.deadline is not None and now + URGENT * entrant.remaining >= entrant.deadline:
            deadline = entrant.deadline
        return -entrant.priority, deadline, *self._fairness.standing(entrant, cost)


def _patience(entrant: Entrant, now: float) -> float:
    """How long the leader's batch may take."""
    return math.inf if entrant.deadline is None else max(0.0, entrant.deadline - now - entrant.remaining)

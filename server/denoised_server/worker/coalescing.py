"""Which component calls are pending, and which run next. Policy only: what a call computes is not its business."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Pending(Generic[T]):
    """One call that a request waits for.

    `key` says which calls it may be joined with: those with an equal one. None stands alone. Higher `priority` runs
    earlier.
    """

    call: T
    key: Hashable | None
    priority: int = 0


@dataclass(slots=True)
class Coalescing(Generic[T]):
    """Pending calls in the order in which they came.

    The call that has waited longest among those of the highest priority leads the next batch, and up to
    `max_joined - 1` calls that fit it come along, in their own order, whatever their priority: joining costs the leader
    little, and waiting would cost the others a batch of their own. A request has one call pending at a time and joins
    the end of the line with the next, so requests on one device take turns at steps and none starves another of its
    priority. Nothing ever waits for partners.
    """

    max_joined: int
    _waiting: list[Pending[T]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, pending: Pending[T]) -> None:
        self._waiting.append(pending)

    def put_back(self, batch: list[Pending[T]]) -> None:
        """Calls that were taken and do not run yet: first in line again."""
        self._waiting[:0] = batch

    def discard(self, pending: Pending[T]) -> bool:
        """Forgets a call that nobody waits for any more; says whether it was still there."""
        if pending not in self._waiting:
            return False
        self._waiting.remove(pending)
        return True

    def next(self) -> list[Pending[T]]:
        """Takes out the calls that run next, as one batch; empty when none is pending."""
        if not self._waiting:
            return []
        lead = max(self._waiting, key=lambda pending: pending.priority)  # max returns the first of equals
        batch = [lead]
        if lead.key is not None:
            others = (pending for pending in self._waiting if pending is not lead and pending.key == lead.key)
            batch += [pending for pending, _ in zip(others, range(self.max_joined - 1), strict=False)]
        taken = {id(pending) for pending in batch}
        self._waiting = [pending for pending in self._waiting if id(pending) not in taken]
        return batch

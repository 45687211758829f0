"""The gate before a worker: admission, for tasks that wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from .admission import Admission
from .callers import Caller
from .forecast import Cost
from .observer import Observer


@dataclass(eq=False, slots=True)
class _Ticket:
    admitted: asyncio.Future[None]
    moved: Callable[[int, float | None], None]
    stays: Callable[[], bool]
    position: int = -1


class Gate:
    """Lets as many tasks pass as admission allows; the others wait and hear where they stand."""

    def __init__(self, worker: str, *, max_running: int, max_waiting: int, observer: Observer) -> None:
        self._worker = worker
        self._admission = Admission[_Ticket](max_running=max_running, max_waiting=max_waiting)
        self._observer = observer

    @property
    def running_count(self) -> int:
        return self._admission.running_count

    @property
    def waiting_count(self) -> int:
        return self._admission.waiting_count

    def wait_of_next(self, *, priority: int, caller: Caller) -> float:
        """Seconds that one who came now would have to wait; 0 where that is not known."""
        return self._admission.wait_of_next(time.monotonic(), priority=priority, client=caller.name)

    @asynccontextmanager
    async def enter(
        self,
        *,
        priority: int,
        caller: Caller,
        cost: Cost,
        moved: Callable[[int, float | None], None],
        stays: Callable[[], bool] = lambda: True,
        alone: bool = False,
        again: bool = False,
    ) -> AsyncIterator[None]:
        """Waits for a place and holds it; `cost`, `alone` and `again` are as for admission.

        `moved` hears each new position, and when it is expected to be admitted, in seconds since the epoch. `stays`
        says whether what is waited for is still behind this gate. Raises QueueFullError.
        """
        ticket = _Ticket(asyncio.get_running_loop().create_future(), moved, stays)
        client, limit = caller.name, caller.quota.running
        self._admission.add(ticket, priority=priority, client=client, limit=limit, alone=alone, again=again, cost=cost)
        try:
            self._advance()
            await ticket.admitted
            yield
        finally:
            self._admission.release(ticket, time.monotonic())
            self._advance()

    def dismiss(self) -> None:
        """Lets those go on without a place whose cause to wait is elsewhere by now."""
        for ticket in self._admission.positions():
            if not (ticket.admitted.done() or ticket.stays()):
                ticket.admitted.set_result(None)

    def _advance(self) -> None:
        for ticket in self._admission.admit(time.monotonic()):
            # One that was cancelled this very moment releases its place as soon as it runs.
            if not ticket.admitted.done():
                ticket.admitted.set_result(None)
        moved = [item for item in self._admission.positions().items() if item[0].position != item[1]]
        waits = self._admission.waits(time.monotonic()) if moved else {}
        for ticket, position in moved:
            wait = waits.get(ticket)
            ticket.position = position
            ticket.moved(position, None if wait is None else time.time() + wait)
        self._observer.queue_changed(self._worker, running=self.running_count, waiting=self.waiting_count)

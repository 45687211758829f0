"""The gate before a worker: admission, for tasks that wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from .admission import Admission
from .callers import Caller
from .observer import Observer


@dataclass(eq=False, slots=True)
class _Ticket:
    admitted: asyncio.Future[None]
    moved: Callable[[int], None]
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

    @asynccontextmanager
    async def enter(
        self, *, priority: int, caller: Caller, moved: Callable[[int], None], alone: bool = False, again: bool = False
    ) -> AsyncIterator[None]:
        """Waits for a place and holds it; `moved` hears each new position. `alone` and `again` are as for admission.

        Raises QueueFullError.
        """
        ticket = _Ticket(asyncio.get_running_loop().create_future(), moved)
        client, limit = caller.name, caller.quota.running
        self._admission.add(ticket, priority=priority, client=client, limit=limit, alone=alone, again=again)
        try:
            self._advance()
            await ticket.admitted
            yield
        finally:
            self._admission.release(ticket, time.monotonic())
            self._advance()

    def _advance(self) -> None:
        for ticket in self._admission.admit(time.monotonic()):
            # One that was cancelled this very moment releases its place as soon as it runs.
            if not ticket.admitted.done():
                ticket.admitted.set_result(None)
        for ticket, position in self._admission.positions().items():
            if ticket.position != position:
                ticket.position = position
                ticket.moved(position)
        self._observer.queue_changed(self._worker, running=self.running_count, waiting=self.waiting_count)

"""One generation: a task that makes events, and a channel that carries them to the caller."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from denoised.errors import DenoisedError

from .channel import Channel
from .messages import Finished, Output, Progress


@dataclass(frozen=True, slots=True)
class Queued:
    """The generation waits; so many will run before it."""

    position: int


@dataclass(frozen=True, slots=True)
class Summary:
    """The generation is over. Times in seconds; no seeds where the caller sent generator states."""

    queue_seconds: float
    finished: Finished
    seeds: tuple[int, ...]


GenerationEvent = Queued | Progress | Output | Summary


class Generation:
    """Runs apart from its caller, so that it can be ended while the caller is busy with a slow connection."""

    def __init__(self) -> None:
        self.events = Channel[GenerationEvent]()
        self.is_admitted = False
        self._task: asyncio.Task[None] | None = None

    def begin(self, work: Coroutine[Any, Any, None], ended: Callable[[], None]) -> None:
        """Starts the work, which puts its events into `events`; `ended` is called when nothing of it runs any more."""
        self._task = asyncio.create_task(self._run(work))
        self._task.add_done_callback(lambda _: ended())

    def interrupt(self, error: DenoisedError) -> None:
        """Ends it now; the caller gets the error."""
        self.events.end(error)
        if self._task is not None:
            self._task.cancel()

    async def leave(self) -> None:
        """Ends it because the caller is gone, or has everything; returns when nothing of it runs any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            self.events.end(error)
        else:
            self.events.end()

"""Tasks that run beside everything else, owned by the object that ends them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from denoised.errors import DenoisedError

logger = logging.getLogger(__name__)


class Background:
    """A set of tasks: a failure is logged when it happens, the rest is cancelled at the end."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, coroutine: Coroutine[Any, Any, object], *, name: str) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine, name=name)
        # The loop itself holds tasks weakly.
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    async def stop(self) -> None:
        while self._tasks:
            tasks = tuple(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, DenoisedError):
            # No bug: a caller may have asked for what cannot be.
            logger.info("%s failed: %s", task.get_name(), error)
        else:
            logger.error("%s failed", task.get_name(), exc_info=error)

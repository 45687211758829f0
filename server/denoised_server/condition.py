"""Waiting until something is true."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Condition:
    """Tasks wait for a predicate; whoever changes what it looks at says so, without waiting for a lock."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    async def until(self, predicate: Callable[[], bool]) -> None:
        while not predicate():
            future = asyncio.get_running_loop().create_future()
            self._waiting.add(future)
            try:
                await future
            finally:
                self._waiting.discard(future)

    def notify(self) -> None:
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

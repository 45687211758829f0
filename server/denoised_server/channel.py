"""A channel: what one task makes and another reads, without either having to wait for the other to act."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

from denoised.errors import WatchLaggedError

T = TypeVar("T")


class Channel(Generic[T]):
    """Items in order, then an end or an error. One reader; writers never wait.

    With a limit, a reader who leaves more items than that unread loses them all and gets WatchLaggedError.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._items: deque[T] = deque()
        self._ended = False
        self._error: Exception | None = None
        self._news = asyncio.Event()

    def put(self, item: T) -> None:
        if self._ended:
            return
        if self._limit is not None and len(self._items) >= self._limit:
            self._items.clear()
            self.end(WatchLaggedError("The watcher did not keep up with the changes.", hint="Watch again."))
            return
        self._items.append(item)
        self._news.set()

    def end(self, error: Exception | None = None) -> None:
        """Lets the reader have what is there, then stop or raise. The first end counts."""
        if not self._ended:
            self._ended, self._error = True, error
            self._news.set()

    def __aiter__(self) -> Channel[T]:
        return self

    async def __anext__(self) -> T:
        while not self._items:
            if self._ended:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._items.popleft()

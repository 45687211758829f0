"""Messages to and from a running call."""

from __future__ import annotations

import asyncio
from asyncio import Queue
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any, Generic, TypeVar

import grpc.aio

from .. import traces
from ..channel import failure

Event = TypeVar("Event")


class AsyncConversation(Generic[Event]):
    """Messages of a call that is answered while it runs. It starts with the iteration, and leaving that cancels it.

    `async for event in conversation` raises a DenoisedError when the call fails.
    """

    def __init__(
        self, start: Callable[[AsyncIterator[Any], Sequence[tuple[str, str]]], Any], method: str, target: str
    ) -> None:
        self._start = start
        self._method = method
        self._target = target
        self._outbox: Queue[Any] = Queue()

    def send(self, message: Any) -> None:
        """Puts a message on its way."""
        self._outbox.put_nowait(message)

    async def __aiter__(self) -> AsyncGenerator[Event, None]:
        with traces.calling(self._method) as headers:
            call = self._start(self._sent(), headers)
            try:
                async for event in call:
                    yield event
            except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
                raise failure(error, self._target) from None
            finally:
                # Closing this generator does not end the call behind it, nor what waits for more to send.
                call.cancel()
                self._outbox.put_nowait(None)

    async def _sent(self) -> AsyncIterator[Any]:
        while (message := await self._outbox.get()) is not None:
            yield message

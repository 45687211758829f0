"""Events of a running call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Generic, TypeVar

import grpc.aio

from .. import traces
from ..channel import failure

Event = TypeVar("Event")


class AsyncStream(Generic[Event]):
    """Messages of a server stream. The call starts with the iteration, and leaving the iteration cancels it.

    `async for event in stream` raises a DenoisedError when the call fails.
    """

    def __init__(self, start: Callable[[Sequence[tuple[str, str]]], Any], method: str, target: str) -> None:
        self._start = start
        self._method = method
        self._target = target

    async def __aiter__(self) -> AsyncGenerator[Event, None]:
        with traces.calling(self._method) as headers:
            call = self._start(headers)
            try:
                async for event in call:
                    yield event
            except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
                raise failure(error, self._target) from None
            finally:
                # Closing this generator does not end the call behind it.
                call.cancel()

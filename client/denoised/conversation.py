"""Messages to and from a running call."""
# Generated from aio/conversation.py by client/unasync.py: edit that one.

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from queue import SimpleQueue as Queue
from typing import Any, Generic, TypeVar

import grpc

from . import traces
from .channel import failure

Event = TypeVar("Event")


class Conversation(Generic[Event]):
    """Messages of a call that is answered while it runs. It starts with the iteration, and leaving that cancels it.

    `for event in conversation` raises a DenoisedError when the call fails.
    """

    def __init__(
        self, start: Callable[[Iterator[Any], Sequence[tuple[str, str]]], Any], method: str, target: str
    ) -> None:
        self._start = start
        self._method = method
        self._target = target
        self._outbox: Queue[Any] = Queue()

    def send(self, message: Any) -> None:
        """Puts a message on its way."""
        self._outbox.put_nowait(message)

    def __iter__(self) -> Generator[Event, None, None]:
        with traces.calling(self._method) as headers:
            call = self._start(self._sent(), headers)
            try:
                yield from call
            except grpc.RpcError as error:
                raise failure(error, self._target) from None
            finally:
                # Closing this generator does not end the call behind it, nor what waits for more to send.
                call.cancel()
                self._outbox.put_nowait(None)

    def _sent(self) -> Iterator[Any]:
        while (message := self._outbox.get()) is not None:
            yield message

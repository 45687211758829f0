"""Events of a running call."""
# Generated from aio/stream.py by client/unasync.py: edit that one.

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Generic, TypeVar

import grpc

from . import traces
from .channel import failure

Event = TypeVar("Event")


class Stream(Generic[Event]):
    """Messages of a server stream. The call starts with the iteration, and leaving the iteration cancels it.

    `for event in stream` raises a DenoisedError when the call fails.
    """

    def __init__(self, start: Callable[[Sequence[tuple[str, str]]], Any], method: str, target: str) -> None:
        self._start = start
        self._method = method
        self._target = target

    def __iter__(self) -> Generator[Event, None, None]:
        with traces.calling(self._method) as headers:
            call = self._start(headers)
            try:
                yield from call
            except grpc.RpcError as error:
                raise failure(error, self._target) from None
            finally:
                # Closing this generator does not end the call behind it.
                call.cancel()

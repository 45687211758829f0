"""Messages between the front-end and a worker: the length of each, then its pickle."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pickle import loads
from typing import Any

_LENGTH = struct.Struct("!Q")
# Room for what usually comes at once.
_ROOM = 64 * 1024


def pack(message: object) -> tuple[bytes, memoryview]:
    """A message as what precedes it, and itself."""
    data = ForkingPickler.dumps(message)
    return _LENGTH.pack(len(data)), data


def receive(sock: socket.socket) -> Iterator[Any]:
    """Messages as they come, on a thread that has nothing else to do, until the other side ends."""
    with sock.makefile("rb", _ROOM) as stream:
        while len(head := stream.read(_LENGTH.size)) == _LENGTH.size:
            (length,) = _LENGTH.unpack(head)
            if len(data := stream.read(length)) < length:
                return
            yield loads(data)


class Frames(asyncio.BufferedProtocol):
    """Messages as they come, on the event loop: each is handed to `deliver`, and `lost` is called at the end.

    What is larger than the buffer gets one of its size, into which the socket is then read without a copy between.
    """

    def __init__(self, deliver: Callable[[Any], None], lost: Callable[[], None]) -> None:
        self._deliver, self._lost = deliver, lost
        self._buffer, self._filled = bytearray(_ROOM), 0

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._buffer)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        low, needed = 0, _LENGTH.size
        view = memoryview(self._buffer)[: self._filled]
        while self._filled - low >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(view, low)
            needed = _LENGTH.size + length
            if self._filled - low < needed:
                break
            self._deliver(loads(view[low + _LENGTH.size : low + needed]))
            low, needed = low + needed, _LENGTH.size
        if low or needed > len(self._buffer):
            rest = view[low:]
            self._buffer, self._filled = bytearray(max(needed, _ROOM)), len(rest)
            self._buffer[: len(rest)] = rest

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost()

"""Messages between the front-end and a worker: how many pieces each has, how long they are, and the pieces."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

from .plain import dumps, loads

# The number of pieces, and the bytes of all that follows; then the length of each piece.
_HEAD = struct.Struct("!IQ")
_LENGTH = struct.Struct("!Q")
# Room for what usually comes at once.
_ROOM = 64 * 1024


def pack(message: object) -> list[bytes]:
    """A message as pieces to send one after the other. Raises TypeError for what is not plain."""
    pieces = dumps(message)
    lengths = b"".join(_LENGTH.pack(len(piece)) for piece in pieces)
    total = len(lengths) + sum(map(len, pieces))
    return [_HEAD.pack(len(pieces), total) + lengths, *pieces]


def unpack(count: int, view: memoryview) -> Any:
    """The message in what follows a head."""
    pieces, start = [], count * _LENGTH.size
    for number in range(count):
        (length,) = _LENGTH.unpack_from(view, number * _LENGTH.size)
        pieces.append(view[start : start + length])
        start += length
    return loads(pieces[0], pieces[1:])


def receive(sock: socket.socket) -> Iterator[Any]:
    """Messages as they come, on a thread that has nothing else to do, until the other side ends."""
    with sock.makefile("rb", _ROOM) as stream:
        while len(head := stream.read(_HEAD.size)) == _HEAD.size:
            count, length = _HEAD.unpack(head)
            if len(data := stream.read(length)) < length:
                return
            yield unpack(count, memoryview(data))


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
        low, needed = 0, _HEAD.size
        view = memoryview(self._buffer)[: self._filled]
        while self._filled - low >= _HEAD.size:
            count, length = _HEAD.unpack_from(view, low)
            needed = _HEAD.size + length
            if self._filled - low < needed:
                break
            self._deliver(unpack(count, view[low + _HEAD.size : low + needed]))
            low, needed = low + needed, _HEAD.size
        if low or needed > len(self._buffer):
            rest = view[low:]
            self._buffer, self._filled = bytearray(max(needed, _ROOM)), len(rest)
            self._buffer[: len(rest)] = rest

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost()

"""Pages of weight files: what a load wants of them is in memory before anybody computes with it.

Libraries map files, and the system then reads a page when it is touched first. Whoever touches it waits, and on the
engine's thread all requests with it. Where the system cannot be asked to read ahead, that is how it stays.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from denoised.errors import DamagedWeightsError

# What is asked for at a time: whoever leaves does so after a piece.
PIECE_BYTES = 16 << 20
# Pieces that are read at a time; a disk is kept busy by more than one.
THREADS = min(4, max(2, os.cpu_count() or 2))

# Of Linux's madvise, since 5.14; the mmap module has no name for it, and would keep Python's lock meanwhile.
_POPULATE_READ = 22
_madvise = ctypes.CDLL(None, use_errno=True).madvise if sys.platform == "linux" else None
_PAGE = mmap.PAGESIZE


def bring(tensors: Iterable[torch.Tensor], came: Callable[[int], None] = lambda size: None) -> None:
    """Returns when the memory of these tensors was read; `came` is told the bytes of each piece, and may raise.

    Raises DamagedWeightsError when the file behind it has become shorter: to touch it would end the process.
    """
    for address, size in _pieces(_stretches(tensors)):
        if _populate(address, size) == errno.EFAULT:
            raise DamagedWeightsError(
                "A weight file has become shorter while it was read.",
                hint="Load the checkpoint when it has been written to its end.",
            )
        came(size)


class ReadAhead:
    """Has the system read whole files beside whatever the loader does until it gets to them."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._wanted, self._lock, self._is_left = self._walk(dict.fromkeys(files)), threading.Lock(), threading.Event()

    def __enter__(self) -> None:
        for _ in range(THREADS if _madvise is not None else 0):
            threading.Thread(target=self._read, name="read-ahead", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._is_left.set()

    def _walk(self, files: Iterable[Path]) -> Iterator[tuple[int, int, object]]:
        for path in files:
            try:
                with path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError):
                # Loading says what is wrong with it.
                continue
            held = ctypes.c_char.from_buffer(mapped)
            for address, size in _pieces([(ctypes.addressof(held), len(mapped))]):
                yield address, size, held

    def _read(self) -> None:
        while not self._is_left.is_set():
            with self._lock:
                address, size, held = next(self._wanted, (0, 0, None))
            if held is None:
                return
            _populate(address, size)
            # Before the next one: the last to let go of a file unmaps it.
            del held


def _stretches(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """Addresses and sizes of the memory of tensors, what touches each other as one."""
    found = list[tuple[int, int]]()
    for address, size in sorted(
        (tensor.data_ptr(), tensor.numel() * tensor.itemsize)
        for tensor in tensors
        if tensor.device.type == "cpu" and tensor.numel()
    ):
        if found and address - _PAGE <= sum(found[-1]):
            first = found[-1][0]
            found[-1] = first, max(sum(found[-1]), address + size) - first
        else:
            found.append((address, size))
    return found


def _pieces(stretches: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for address, size in stretches:
        for begin in range(address, address + size, PIECE_BYTES):
            yield begin, min(PIECE_BYTES, address + size - begin)


def _populate(address: int, size: int) -> int:
    """What is wrong with it, as the system's error number; 0 when nothing is."""
    if _madvise is None:
        return 0
    begin = address - address % _PAGE
    # Python's lock is let go of meanwhile.
    failed = _madvise(ctypes.c_void_p(begin), ctypes.c_size_t(address + size - begin), _POPULATE_READ)
    return ctypes.get_errno() if failed else 0

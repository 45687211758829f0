"""Buffers in the host's memory, each mapped by itself.

malloc keeps a freed buffer for what is asked of it next, and something small that comes to lie in it keeps the rest.
What is mapped by itself is back with the system as soon as nothing refers to it, and how much that is is known exactly.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import weakref

import torch

# By number: entering and taking out are single steps, for finalizers run on any thread and at any moment.
_sizes: dict[int, int] = {}
_numbers = itertools.count()


def empty(size: int) -> torch.Tensor:
    """So many bytes, zeros at first. Raises MemoryError."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    try:
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemoryError(f"tried to allocate {size} bytes") from None
    number = next(_numbers)
    _sizes[number] = size
    weakref.finalize(mapping, _sizes.pop, number).atexit = False
    return torch.frombuffer(mapping, dtype=torch.uint8)


def size_bytes() -> int:
    """What is mapped at this moment, by all of them."""
    return sum(list(_sizes.values()))

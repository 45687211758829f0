"""Memory that really runs out: the kernel refuses this process more memory than it was given."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
from denoised_server.worker import host_memory

MIB = 1 << 20
M_MMAP_THRESHOLD = -3

# From now on, what is freed in pieces of this size goes back at once: otherwise new ones are served from it.
ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)


@contextmanager
def limited(extra_bytes: int) -> Iterator[None]:
    """Within it, this process may have so many bytes more than at its start."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    host_memory.trim()
    resource.setrlimit(resource.RLIMIT_DATA, (psutil.Process().memory_info().data + extra_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))

"""The memory of the machine: how much there is, and giving back what was freed, which glibc keeps otherwise."""

from __future__ import annotations

import ctypes
import ctypes.util

import psutil


def of_machine(setting: int | float) -> int:
    """Bytes, of what may be a share of all there is."""
    return int(setting * psutil.virtual_memory().total) if isinstance(setting, float) else setting


def trim() -> None:
    """Does nothing where the C library has no malloc_trim."""
    name = ctypes.util.find_library("c")
    trim_function = getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None
    if trim_function is not None:
        trim_function(0)

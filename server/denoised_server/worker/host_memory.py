"""Gives freed memory back to the operating system: glibc keeps it otherwise."""

from __future__ import annotations

import ctypes
import ctypes.util


def trim() -> None:
    """Does nothing where the C library has no malloc_trim."""
    name = ctypes.util.find_library("c")
    trim_function = getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None
    if trim_function is not None:
        trim_function(0)

"""The memory of the machine: how much there is, and giving back what was freed, which glibc keeps otherwise."""

from __future__ import annotations

import ctypes

import psutil

_LIBC = ctypes.CDLL(None)


def of_machine(setting: int | float) -> int:
    """Bytes, of what may be a share of all there is."""
    return int(setting * psutil.virtual_memory().total) if isinstance(setting, float) else setting


def trim() -> None:
    """Does nothing where the C library has no malloc_trim."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


class Rest:
    """Gives memory back once nothing has run for a while: the next call takes it from what was freed until then."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._idle_since = seconds, 0.0
        self._is_due = False

    def look(self, *, is_idle: bool, now: float) -> bool:
        """Whether it is time to."""
        if not is_idle:
            self._idle_since, self._is_due = now, True
            return False
        is_over = self._is_due and now - self._idle_since >= self._seconds
        self._is_due = self._is_due and not is_over
        return is_over

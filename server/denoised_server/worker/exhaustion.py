"""Running out of memory, as torch and Python say it."""

from __future__ import annotations

import re

import torch

_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_ASKED = re.compile(r"tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB|TiB)", re.IGNORECASE)
# Of RuntimeErrors: torch's allocator on the CPU, in its older and its newer words, the driver's, and libraries'.
_WORDS = re.compile(
    "not enough memory|can't allocate memory|CUDA error: out of memory|STATUS_ALLOC_FAILED|std::bad_alloc"
)


def is_out_of_memory(error: BaseException | None) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None


def asked_bytes(error: BaseException) -> int:
    """Size of the allocation that failed; 0 where the error does not say."""
    found = _ASKED.search(str(error))
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0

"""How much memory a component call takes at its peak, by the word of torch's allocators.

On a GPU the allocator knows. On the CPU it reports each allocation of the thread to the profiler, and only while that
runs: measuring costs some microseconds for each, and is for a call now and then. What libraries below torch take for
themselves, as oneDNN does for its scratch pads, is not in it.
"""

from __future__ import annotations

import os
import resource
from types import TracebackType
from typing import Any

import torch
from torch._C import _autograd
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig

# Open from the beginning: it is looked at before each call.
_STATM = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


def can_measure(device: torch.device) -> bool:
    """Not in a process with a limit on its memory: the profiler ends the process when it finds none for its notes."""
    if device.type == "cuda":
        return True
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return limits == [resource.RLIM_INFINITY] * 2


def taken_bytes(device: torch.device) -> int:
    """What is taken at this moment: by tensors on a GPU, by all that only this process has on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(os.pread(_STATM, 256, 0).split()[5]) * resource.getpagesize()


class Meter:
    """Around one call, on the thread that makes it; `peak_bytes` is known after it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak_bytes = 0

    def __enter__(self) -> Meter:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            _autograd._enable_profiler_legacy(_CONFIG)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self.peak_bytes = _peak(_autograd._disable_profiler_legacy())


def _peak(events: Any) -> int:
    live = peak = 0
    for event in (event for thread in events for event in thread if event.kind() == "memory_alloc"):
        live += event.cpu_memory_usage()
        peak = max(peak, live)
    return peak


_CONFIG = ProfilerConfig(
    ProfilerState.CPU,
    False,  # shapes
    True,  # memory
    False,  # stacks
    False,  # operations
    False,  # modules
    _ExperimentalConfig(),
)

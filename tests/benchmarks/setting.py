"""What benchmarks share: a daemon with one compute thread, and medians with their spread."""

from __future__ import annotations

import os

# Before torch is imported: one compute thread in this process too.
os.environ["OMP_NUM_THREADS"] = "1"

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.daemon import Daemon

torch.set_num_threads(1)


@contextmanager
def daemon(allow: Iterable[Path] = ()) -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory() as state, Daemon(Path(state), allow=allow, threads=1) as running:
        yield running


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> str:
    """Median and quartiles, in milliseconds."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle * 1e3:.1f} ms ({low * 1e3:.1f}-{high * 1e3:.1f})"

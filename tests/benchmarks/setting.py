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


def spread(values: Sequence[float], unit: str = "ms") -> str:
    """Median and quartiles: of seconds in milliseconds, of others as they are."""
    low, middle, high = (value * (1e3 if unit == "ms" else 1) for value in statistics.quantiles(values, n=4))
    return f"{middle:.1f} {unit} ({low:.1f}-{high:.1f})"

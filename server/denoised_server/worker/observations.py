"""A distribution, as Prometheus counts it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from denoised_server.messages import Histogram


class Observations:
    """How many values fell into each bucket. Written by one thread, read by any."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(float(bound) for bound in bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def histogram(self) -> Histogram:
        cumulative, total = [], 0
        for count in list(self._counts):
            total += count
            cumulative.append(total)
        return Histogram(self._bounds, tuple(cumulative[:-1]), total, self._sum)

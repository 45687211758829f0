"""How long batches of one kind of call take by their size, as measured, and so how many calls are worth joining."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

# How many measurements of a size are looked back on, and how many it takes to believe them: a first run also pays for
# what libraries prepare, and other work on the machine only ever makes a run longer.
RECENT, ENOUGH = 8, 3
# Running in parts has to take less than this share of running whole.
WORTHWHILE = 0.9
# How often parts are believed to be faster before the whole is measured again: estimates must be able to fall.
BELIEVED = 64


class BatchTimes:
    """Sizes are numbers of samples. What was not measured is taken to be as good as what was."""

    def __init__(self) -> None:
        self._recent: dict[int, deque[float]] = {}
        self._sizes: list[int] = []
        self._seconds: dict[int, float] = {}
        self._best_rate = math.inf
        self._parts = 0

    def learn(self, size: int, seconds: float) -> None:
        recent = self._recent.setdefault(size, deque(maxlen=RECENT))
        recent.append(seconds)
        if len(recent) < ENOUGH:
            return
        if size not in self._seconds:
            insort(self._sizes, size)
        self._seconds[size] = min(recent)
        self._best_rate = min(self._seconds[size] / size for size in self._sizes)

    def estimate(self, size: float) -> float:
        """Seconds; between two known sizes by a straight line, above them at the largest one's rate."""
        if not self._sizes:
            return 0.0
        place = bisect_left(self._sizes, size)
        if place == len(self._sizes):
            largest = self._sizes[-1]
            return self._seconds[largest] * size / largest
        above = self._sizes[place]
        if place == 0 or above == size:
            return self._seconds[above]
        below = self._sizes[place - 1]
        share = (size - below) / (above - below)
        return self._seconds[below] + share * (self._seconds[above] - self._seconds[below])

    def count(self, sizes: Sequence[int], patience: float = math.inf) -> int:
        """How many of these calls, from the first on, to run as one batch, if the others then run in the same way.

        All of them, unless parts take less time in all, or the batch would take longer than `patience` seconds.
        """
        total = sum(sizes)
        most = len(sizes)
        while most > 1 and self.estimate(sum(sizes[:most])) > patience:
            most -= 1
        if most < len(sizes) or most == 1 or not self._sizes:
            return most
        whole = self.estimate(total)
        if whole * WORTHWHILE <= self._best_rate * total:
            return most
        each = total / most
        seconds, best = min((self._in_parts(each, most, part), -part) for part in range(1, most))
        if seconds >= whole * WORTHWHILE:
            return most
        self._parts += 1
        return most if self._parts % BELIEVED == 0 else -best

    def _in_parts(self, each: float, count: int, part: int) -> float:
        full, rest = divmod(count, part)
        return full * self.estimate(part * each) + (self.estimate(rest * each) if rest else 0.0)

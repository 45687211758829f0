"""The pace of a generation: how fast its steps follow each other, and so when it is expected to end."""

from __future__ import annotations

from dataclasses import dataclass

from .forecast import Cost


@dataclass(slots=True)
class Pace:
    """Of one run that began at `began`. Times are in seconds, on any one clock.

    Before two steps are known, what is usual counts; `cost` also says what comes after the last step.
    """

    cost: Cost
    began: float
    _first: tuple[int, float] | None = None
    _last: tuple[int, float] = (0, 0.0)

    def end(self, completed: int, total: int, now: float) -> float | None:
        """When it is expected to end, told that so many steps are done; None where nothing is known."""
        if completed > self._last[0]:
            self._last = completed, now
            self._first = self._first or self._last
        if self._first is not None and self._last[0] > self._first[0]:
            seconds = (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])
            return max(now, self._last[1] + seconds * (total - completed) + self.cost.tail)
        if self.cost.usual is not None:
            return max(now, self.began + self.cost.usual)
        return None

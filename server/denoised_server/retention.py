"""Retention: how long results are kept for callers who come back for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Result:
    """A result that is kept: its size, and when its generation ended, in seconds since the epoch."""

    name: str
    size_bytes: int
    end_time: float


class Retention:
    """Keeps results for `ttl` seconds after their end, and of those the latest that take no more than `max_bytes`."""

    def __init__(self, *, ttl: float, max_bytes: int) -> None:
        self._ttl = ttl
        self._max_bytes = max_bytes

    def expire_time(self, end_time: float) -> float:
        return end_time + self._ttl

    def surplus(self, results: Iterable[Result], now: float) -> list[str]:
        """Names of those to let go of."""
        left, gone = self._max_bytes, []
        for result in sorted(results, key=lambda result: result.end_time, reverse=True):
            left -= result.size_bytes
            if left < 0 or self.expire_time(result.end_time) <= now:
                gone.append(result.name)
        return gone

"""Where weights may be, and how fast they come back from there, as it was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

# Bytes per second that are taken for granted until the first measurement.
PRESUMED = {"host": 8e9, "disk": 1e9}
# What a new measurement weighs beside all before it.
WEIGHT = 0.3
# Smaller copies measure what a copy costs at all.
TELLING_BYTES = 1 << 20


class Tier(StrEnum):
    """Where the weights of a component are, from the closest to the computation to the farthest from it."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(slots=True)
class Bandwidths:
    """Bytes per second from the lower tiers to the device."""

    _known: dict[str, float] = field(default_factory=lambda: dict(PRESUMED))
    _measured: set[str] = field(default_factory=set)

    def of(self, tier: Tier) -> float:
        return self._known[tier]

    def learn(self, tier: Tier, size: int, seconds: float) -> None:
        """So many bytes came from this tier in so many seconds."""
        if size < TELLING_BYTES or seconds <= 0:
            return
        weight = WEIGHT if tier in self._measured else 1.0
        self._measured.add(tier)
        self._known[tier] += weight * (size / seconds - self._known[tier])

    def seconds(self, tier: Tier, size: int) -> float:
        """What bringing so many bytes from this tier takes."""
        return size / self._known[tier]

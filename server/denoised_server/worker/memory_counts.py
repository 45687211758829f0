"""What became of memory since the worker started, told by whoever did it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from denoised_server.messages import Histogram

from .ladder import NOTHING, Rung
from .observations import Observations
from .tiers import Tier

# Why a component had to leave a tier: for others to have room, after its keep_alive, or because memory ran out.
EVICTION_REASONS = ("room", "idle", "out_of_memory")
EVICTION_TIERS = (Tier.DEVICE, Tier.HOST)
# What helped a call that ran out of memory, from the cheapest on, and what stands for it where the request failed.
RUNGS = (*Rung, NOTHING)
ESTIMATES = ("weights", "working_set")
# Seconds.
AGE_BOUNDS = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0)
# Where components come to the device from, and the seconds that it takes.
ARRIVAL_TIERS = (Tier.HOST, Tier.DISK)
ARRIVAL_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# Measured over estimated.
RATIO_BOUNDS = (0.25, 0.5, 0.75, 0.9, 0.98, 1.02, 1.1, 1.25, 1.5, 2.0, 4.0)


class MemoryCounts:
    """Written by several threads, each figure by one of them at a time; read by any."""

    def __init__(self) -> None:
        self._evictions = {reason: Counter(dict.fromkeys(map(str, EVICTION_TIERS), 0)) for reason in EVICTION_REASONS}
        self._eviction_ages = Observations(AGE_BOUNDS)
        self._recoveries = Counter(dict.fromkeys(map(str, RUNGS), 0))
        self._ratios = {name: Observations(RATIO_BOUNDS) for name in ESTIMATES}
        self._arrivals = {str(tier): Observations(ARRIVAL_BOUNDS) for tier in ARRIVAL_TIERS}
        self._arrived_bytes = Counter(dict.fromkeys(self._arrivals, 0))

    def arrived(self, tier: Tier, size: int, seconds: float) -> None:
        """A component came to the device from this tier."""
        self._arrivals[tier].observe(seconds)
        self._arrived_bytes[tier] += size

    def evicted(self, reason: str, tier: Tier, age: float) -> None:
        """A component left a tier, so many seconds after its last use."""
        self._evictions[reason][tier] += 1
        self._eviction_ages.observe(age)

    def recovered(self, rung: str) -> None:
        """A call ran out of memory, and this helped."""
        self._recoveries[rung] += 1

    def estimated(self, name: str, estimate: int, measured: int) -> None:
        """So many bytes were expected and so many came; where none were expected there is nothing to compare."""
        if estimate > 0:
            self._ratios[name].observe(measured / estimate)

    @property
    def evictions(self) -> Mapping[str, Mapping[str, int]]:
        return {reason: dict(tiers) for reason, tiers in self._evictions.items()}

    @property
    def eviction_ages(self) -> Histogram:
        return self._eviction_ages.histogram()

    @property
    def arrivals(self) -> Mapping[str, Histogram]:
        return {tier: seconds.histogram() for tier, seconds in self._arrivals.items()}

    @property
    def arrived_bytes(self) -> Mapping[str, int]:
        return dict(self._arrived_bytes)

    @property
    def recoveries(self) -> Mapping[str, int]:
        return dict(self._recoveries)

    @property
    def estimate_ratios(self) -> Mapping[str, Histogram]:
        return {name: ratios.histogram() for name, ratios in self._ratios.items()}

"""What to try next when a component call has run out of memory. Policy only: how each is done is not its business."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum


class Rung(StrEnum):
    """One way to make a call fit, in the order in which they are tried: what costs others least comes first."""

    FREE_CACHES = "free_caches"
    EVICT_IDLE = "evict_idle"
    SLICE = "slice"
    TILE = "tile"
    SPLIT = "split"
    RUN_ALONE = "run_alone"
    OFFLOAD = "offload"


# Those that take the batch apart: its parts begin a climb of their own.
APART = frozenset({Rung.SPLIT, Rung.RUN_ALONE})
# Stands for a rung where calls are counted that none has helped.
NOTHING = "none"


@dataclass(frozen=True, slots=True)
class Climb:
    """A call that ran out of memory, as far as it matters for what helps.

    `requests` is how many share it. `can_slice` says that the component can take its samples one by one and that there
    are several, `can_tile` that it can work in tiles. `is_exact` is a call whose request was promised the bits of a run
    alone: a tiled picture is another one. `can_evict` and `can_offload` say whether there is anybody to make room.
    """

    requests: int = 1
    can_slice: bool = False
    can_tile: bool = False
    is_exact: bool = False
    can_evict: bool = False
    can_offload: bool = False

    def next(self, tried: Collection[Rung]) -> Rung | None:
        """The rung to try after these; None when nothing is left and the call fails."""
        return next((rung for rung in Rung if rung not in tried and self._is_open(rung)), None)

    def _is_open(self, rung: Rung) -> bool:
        match rung:
            case Rung.FREE_CACHES:
                return True
            case Rung.EVICT_IDLE:
                return self.can_evict
            case Rung.SLICE:
                # One sample at a time differs by rounding, as a joined call does.
                return self.can_slice and not self.is_exact
            case Rung.TILE:
                return self.can_tile and not self.is_exact
            case Rung.SPLIT:
                return self.requests > 2
            case Rung.RUN_ALONE:
                return self.requests == 2
            case Rung.OFFLOAD:
                # What others need next is brought back for them; a batch is taken apart before it comes to that.
                return self.can_offload and self.requests == 1

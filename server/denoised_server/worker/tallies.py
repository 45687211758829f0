"""What became of component calls, by the method that was called: how many were joined, and why the others were not."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from denoised_server.messages import MethodStats


class Lone(StrEnum):
    """Why a call ran by itself."""

    FORBIDDEN = "forbidden"
    CHANGED = "changed"
    UNBATCHED = "unbatched"
    REFUSED = "refused"
    VERIFYING = "verifying"
    UNMATCHED = "unmatched"


@dataclass(slots=True)
class Tally:
    """Of one method, since the worker started.

    `agreed` is the largest difference among the kinds of joined call that agreed with lone ones, `disagreed` the
    smallest among those that did not; both in units of the tolerance.
    """

    calls: int = 0
    joined_calls: int = 0
    lone_calls: Counter[Lone] = field(default_factory=Counter)
    verified_kinds: int = 0
    refused_kinds: int = 0
    agreed: float = 0.0
    disagreed: float = math.inf

    def verified(self, difference: float, *, is_new: bool) -> None:
        self.verified_kinds += is_new
        self.agreed = max(self.agreed, difference)

    def refused(self, difference: float) -> None:
        self.refused_kinds += 1
        self.disagreed = min(self.disagreed, difference)

    def stats(self, method: str) -> MethodStats:
        return MethodStats(
            method=method,
            calls=self.calls,
            joined_calls=self.joined_calls,
            lone_calls={str(reason): count for reason, count in list(self.lone_calls.items())},
            verified_kinds=self.verified_kinds,
            refused_kinds=self.refused_kinds,
            agreed_difference=self.agreed if self.verified_kinds else None,
            refused_difference=self.disagreed if self.refused_kinds else None,
        )

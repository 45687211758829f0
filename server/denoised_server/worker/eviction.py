"""Which components leave the device when others need their room. Policy only: moving them is not its business.

What leaves is what is worth least for the room it takes: a component is worth what bringing it back costs, times how
often it will likely be wanted, which is told by its latest uses, times the handles that hold it. Never leaves what is
in use or pinned. What has come for a use that it has not had yet leaves last, and only for a call that waits: otherwise
pipelines that were loaded one after another would push each other out before the first image.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

# The latest uses that count: with one, the longest unused would leave first, and a single pass over many rarely used
# components would push out what is wanted all the time.
USES = 8
# How long a component that has come waits for its first use before it may leave like any other. Seconds.
GRACE_SECONDS = 60.0
# Two components that calls wait for in turn would push each other out for every call. One that is in demand stays so
# many times longer than bringing it back takes, but no shorter than the seconds.
STAY = 10.0
STAY_SECONDS = 1.0


@dataclass(slots=True)
class Uses:
    """When a component came to the device, and when it was used. Times in seconds on one clock."""

    arrival: float
    times: deque[float] = field(default_factory=lambda: deque(maxlen=USES))

    def came(self, now: float) -> None:
        self.arrival = now

    def used(self, now: float, *, again: bool = False) -> None:
        """By a request; `again` by the same one, whose calls count as one use."""
        if again and self.times:
            self.times[-1] = now
        else:
            self.times.append(now)

    @property
    def last(self) -> float:
        """The latest use; before the first one, the arrival."""
        return self.times[-1] if self.times else self.arrival

    def rate(self, now: float) -> float:
        """Uses per second, as the latest ones tell; it falls for as long as nothing comes."""
        since = self.times[0] if self.times else self.arrival
        return max(1, len(self.times)) / max(now - since, 1e-3)

    def is_fresh(self, now: float) -> bool:
        """Whether it waits for the first use since it came."""
        is_unused = not self.times or self.times[-1] < self.arrival
        return is_unused and now - self.arrival < GRACE_SECONDS


@dataclass(frozen=True, slots=True)
class Resident:
    """A component on the device: the bytes that go with it, what bringing them back takes, and who holds it.

    `is_wanted` says that calls of it wait; `is_fixed` that it cannot leave: it is in a call, pinned, on the move, or
    there is nowhere to bring it back from.
    """

    digest: str
    size: int
    return_seconds: float
    users: int
    uses: Uses
    is_wanted: bool = False
    is_fixed: bool = False

    def worth(self, now: float) -> float:
        """Seconds that keeping it likely saves in a second, for each byte that it takes."""
        return max(self.users, 1) * self.return_seconds * self.uses.rate(now) / max(self.size, 1)

    def has_stayed(self, now: float) -> bool:
        """Whether it was here long enough to go although calls of it wait."""
        return now - self.uses.arrival >= max(STAY_SECONDS, STAY * self.return_seconds)


def choose(
    residents: Iterable[Resident], needed_bytes: int, now: float, *, for_call: bool
) -> Sequence[Resident] | None:
    """Who leaves to make so many bytes of room; None when all that may leave does not make it.

    A load takes what is idle. A call that waits also takes what has come for a use that it has not had, and what other
    calls wait for, once that has stayed long enough.
    """
    movable = [resident for resident in residents if not resident.is_fixed and resident.size > 0]
    idle = [each for each in movable if not each.is_wanted and not each.uses.is_fresh(now)]
    fresh = [each for each in movable if not each.is_wanted and each.uses.is_fresh(now)]
    wanted = [each for each in movable if each.is_wanted and each.has_stayed(now)]
    chosen: list[Resident] = []
    for group in (idle, fresh, wanted) if for_call else (idle,):
        for resident in sorted(group, key=lambda each: each.worth(now)):
            if sum(each.size for each in chosen) >= needed_bytes:
                break
            chosen.append(resident)
    spare = sum(each.size for each in chosen) - needed_bytes
    if spare < 0:
        return None
    # Small ones that were chosen before a large one made room enough may stay.
    for resident in reversed(chosen[:]):
        if resident.size <= spare:
            spare -= resident.size
            chosen.remove(resident)
    return chosen


def movable_bytes(residents: Iterable[Resident]) -> int:
    """What could leave if it had to, with what calls wait for."""
    return sum(each.size for each in residents if not each.is_fixed)

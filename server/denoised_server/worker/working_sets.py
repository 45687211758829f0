"""How much memory calls work in, as it was measured last. Policy only: measuring is not its business.

What a call takes beside the weights depends on the component, on the shape and the element type of what it is given,
and on how many samples there are. Of each such kind the highest of the latest measurements counts: estimates rise at
once, and fall when what made them high has not come again for a while. Otherwise one odd call would keep others out for
ever.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

# How many measurements of a kind and size are looked back on.
RECENT = 8
# How long it is believed that a call needs more than there was, when it ran out of memory. Seconds.
BELIEVED_SECONDS = 600.0
# Runs of a kind and size are measured ever more rarely, and at least every so many: measuring takes milliseconds.
EVERY = 1024
# Bytes for each byte of its arguments that a call is taken to need before anything like it was measured: a VAE's
# latents are few beside the picture that comes of them. Real families need about half of it.
PRESUMED = {"decode": 20_000, "encode": 800}
PRESUMED_OTHERWISE = 2_000
# Kinds that are remembered.
KINDS = 1024


class Kind(NamedTuple):
    """Calls that are alike but for the number of samples.

    `component` identifies it by its class and weights; `row_bytes` is the size of one sample's arguments, rounded up.
    """

    component: str
    method: str
    row_bytes: int
    dtype: str


def bucket(size: int) -> int:
    """Rounds up, by a quarter at most: pictures of about one size are one kind."""
    shift = max(0, size.bit_length() - 3)
    return -(-size >> shift) << shift


@dataclass(slots=True)
class _Marks:
    """Of one kind and number of samples: measurements, and when more than `floor` bytes were found to be needed."""

    measured: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT))
    runs: int = 0
    floor: int = 0
    floor_time: float = 0.0

    def high(self, now: float) -> int:
        floor = self.floor if now - self.floor_time < BELIEVED_SECONDS else 0
        return max(max(self.measured, default=0), floor)


class WorkingSets:
    """Times in seconds on one clock, sizes in bytes."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[Kind, dict[int, _Marks]] = OrderedDict()

    def is_due(self, kind: Kind, rows: int) -> bool:
        """Counts a call that is about to run, and says whether to measure it."""
        marks = self._marks(kind, rows)
        marks.runs += 1
        return marks.runs.bit_count() == 1 or marks.runs % EVERY == 0

    def measured(self, kind: Kind, rows: int, size: int) -> None:
        """A call took so much at its peak."""
        self._marks(kind, rows).measured.append(max(1, size))

    def exhausted(self, kind: Kind, rows: int, size: int, now: float) -> None:
        """A call ran out of memory when it needed so much, and would have needed more."""
        marks = self._marks(kind, rows)
        marks.floor, marks.floor_time = size, now

    def estimate(self, kind: Kind, rows: int, now: float) -> int:
        """What a call will take; rather too much than too little, before it was measured."""
        marks = self._kinds.get(kind, {})
        if rows in marks and (high := marks[rows].high(now)):
            return high
        highs = self._highs(kind, now)
        if larger := [count for count in highs if count >= rows]:
            return highs[min(larger)]
        if highs:
            # In proportion, though some of it does not grow with the samples.
            most = max(highs)
            return highs[most] * rows // most
        presumed = PRESUMED.get(kind.method, PRESUMED_OTHERWISE) * kind.row_bytes * rows
        return min((self._by_likeness(kind, rows, other, now) for other in self._alike(kind, now)), default=presumed)

    def most(self, kind: Kind, rows: Sequence[int], room: int, now: float) -> int:
        """How many of these calls, from the first on, there is room for together; one at least."""
        count = len(rows)
        while count > 1 and self.estimate(kind, sum(rows[:count]), now) > room:
            count -= 1
        return count

    def _by_likeness(self, kind: Kind, rows: int, other: Kind, now: float) -> int:
        highs, ratio = self._highs(other, now), kind.row_bytes / other.row_bytes
        most = max(highs)
        # Attention grows with the square; what is fixed does not shrink.
        return int(highs[most] * max(1.0, ratio * max(1.0, ratio) * rows / most))

    def _alike(self, kind: Kind, now: float) -> list[Kind]:
        """Kinds of the same method, of which something is known."""
        return [
            other
            for other in self._kinds
            if (other.component, other.method, other.dtype) == (kind.component, kind.method, kind.dtype)
            and self._highs(other, now)
        ]

    def _highs(self, kind: Kind, now: float) -> dict[int, int]:
        marks = self._kinds.get(kind, {})
        return {rows: high for rows, each in marks.items() if (high := each.high(now))}

    def _marks(self, kind: Kind, rows: int) -> _Marks:
        if kind not in self._kinds and len(self._kinds) >= KINDS:
            self._kinds.popitem(last=False)
        marks = self._kinds.setdefault(kind, {})
        self._kinds.move_to_end(kind)
        return marks.setdefault(rows, _Marks())

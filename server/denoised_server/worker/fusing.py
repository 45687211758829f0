"""Which requests run as one `__call__`, and what is known of doing so. Policy only.

Requests are of one kind when they are equal but for prompt, seed and client. Whether a pipeline that gets lists of
prompts and generators draws what it draws for each cannot be seen from outside, so each kind is proven before it is
fused: a few requests are run once more, fused, and compared. Until then, and for kinds that came out otherwise, each
runs by itself, and joins others at its calls.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

# Kinds that are remembered.
KINDS = 1024
# The share of a run that those of its kind may be waited for, while the device has other work.
PATIENCE = 0.15
# Whoever asks for the next as soon as one is there is back within this. Seconds.
RETURN_SECONDS = 0.03
# A proof costs about what three requests cost: there may be a few at once, and then one for so many requests.
PROOFS, REQUESTS_PER_PROOF = 4, 32


@dataclass(slots=True)
class _Kind:
    """`most` is how many were not found to be too many; None while nothing is proven, 1 when it came out otherwise.

    `longest` is the call of such a request that takes longest: seconds, key and samples. The last run ended at `ended`
    and took `seconds`.
    """

    most: int | None = None
    longest: tuple[float, Hashable, int] = (0.0, None, 1)
    ended: float = -math.inf
    seconds: float = 0.0


@dataclass(slots=True)
class Fusing:
    """`worth` says how many calls of a key, each with so many samples, are worth joining of so many that are there."""

    limit: int
    worth: Callable[[Hashable, Sequence[int]], int]
    _kinds: OrderedDict[Hashable, _Kind] = field(default_factory=OrderedDict)
    _credit: float = PROOFS
    _is_proving: bool = False

    def groups(self, kind: Hashable, requests: Sequence[T]) -> list[list[T]]:
        """Requests that have come together, as those that are to run as one; all in their order."""
        self._credit = min(PROOFS, self._credit + len(requests) / REQUESTS_PER_PROOF)
        size = 1
        if kind is not None and len(requests) > 1:
            known = self._find(kind)
            size = min(known.most or 1, len(requests))
            if size > 1 and known.longest[1] is not None:
                size = max(1, self.worth(known.longest[1], [known.longest[2]] * size))
        return [list(requests[start : start + size]) for start in range(0, len(requests), size)]

    def wants_proof(self, kind: Hashable, together: int) -> bool:
        """Whether to begin to prove this kind, of which so many requests have come together; `judge` has to follow."""
        if kind is None or together < 2 or self._is_proving or self._credit < 1 or self._find(kind).most is not None:
            return False
        self._credit -= 1
        self._is_proving = True
        return True

    def judge(self, kind: Hashable, is_equal: bool | None) -> None:
        """How a proof came out; None when it did not come to its end."""
        self._is_proving = False
        if is_equal is not None:
            self._find(kind).most = self.limit if is_equal else 1

    def gathers(self, kind: Hashable, together: int, waited: float, ends: Iterable[float], now: float) -> bool:
        """Whether so many that have waited so long rather wait on, because others of their kind are about to come back.

        `ends` are the seconds until runs of the kind end. To be asked while the device has other work: those that start
        one by one would run their pipelines' Python one by one, time and again.
        """
        known = self._kinds.get(kind)
        if known is None or together >= (known.most or 1):
            return False
        left = PATIENCE * known.seconds - waited
        return left > 0 and (now - known.ended < RETURN_SECONDS or any(end < left for end in ends))

    def ended(self, kind: Hashable, seconds: float, now: float) -> None:
        """A run of this kind has ended, after so many seconds."""
        if kind is not None:
            known = self._find(kind)
            known.ended, known.seconds = now, seconds

    def called(self, kind: Hashable, key: Hashable, rows: int, seconds: float) -> None:
        """A request of this kind has made a call: with so many samples, in a batch that took so long."""
        if kind is not None and key is not None:
            known = self._find(kind)
            known.longest = max(known.longest, (seconds, key, rows), key=lambda call: call[0])

    def failed(self, kind: Hashable, together: int) -> None:
        """So many failed as one: they may have been too many."""
        self._find(kind).most = max(1, together // 2)

    def _find(self, kind: Hashable) -> _Kind:
        known = self._kinds.setdefault(kind, _Kind())
        self._kinds.move_to_end(kind)
        if len(self._kinds) > KINDS:
            self._kinds.popitem(last=False)
        return known

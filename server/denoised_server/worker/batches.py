"""Component calls, run: alone, or joined with others once that is known to come to the same.

That a component treats samples independently cannot be seen from outside. Each kind of joined call is therefore run
both ways before it is believed, and the lone results are what requests get meanwhile. What was seen holds only for what
differed between the calls when it was seen: two calls at one timestep say nothing of calls at two.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch

from . import exhaustion, joining, randomness, splitting
from .inputs import Inputs
from .joining import Arguments, NotJoinableError
from .ladder import Rung
from .observations import Observations
from .overlay import Overlay
from .phases import Phases
from .recovery import Recovery
from .seam import Method, Verified
from .splitting import Layout
from .tallies import Lone, Tally
from .trial import Trial, Tried

logger = logging.getLogger(__name__)

BATCH_SIZE_BOUNDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

Kind: TypeAlias = Hashable


@dataclass(slots=True)
class Costs:
    """What the calls of one request came to; a joined call counts in full.

    `recoveries` are the rungs, in order, without which calls would have run out of memory.
    """

    calls: int = 0
    joined_calls: int = 0
    max_joined: int = 0
    batch_sizes: Counter[int] = field(default_factory=Counter)
    device_seconds: float = 0.0
    phases: Phases = field(default_factory=Phases)
    recoveries: dict[Rung, None] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Call:
    """One component call; `arguments` is None for one that stands alone, and `lone` says why.

    `together` is how many requests it is of: more than one where these run as one.
    """

    method: Method
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arguments: Arguments | None
    overlay: Overlay
    costs: Costs
    lone: Lone = Lone.UNBATCHED
    together: int = 1

    @property
    def key(self) -> Hashable | None:
        """Equal for calls that may be joined; None for one that stands alone."""
        if self.arguments is None or self.arguments.key in self.method.refused:
            return None
        return id(self.method), self.arguments.key


class Outcome(NamedTuple):
    """What a call returned or raised."""

    value: Any = None
    error: BaseException | None = None


class Ran(NamedTuple):
    """Outcomes of calls, in their order; None for a call that has to wait: until the others have shown more, or because
    there is no room for it beside them.

    `as_one` says that they ran as one, so that the time it took is that of a batch of their size.
    """

    outcomes: Sequence[Outcome | None]
    as_one: bool = False


@dataclass(slots=True)
class Batches:
    """Runs batches of calls with equal keys, and counts them."""

    recovery: Recovery = field(default_factory=lambda: Recovery(torch.device("cpu")))
    counts: Counter[str] = field(default_factory=Counter)
    tallies: defaultdict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    device_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    sizes: Observations = field(default_factory=lambda: Observations(BATCH_SIZE_BOUNDS))

    def run(self, calls: list[Call]) -> Ran:
        if len(calls) == 1:
            return Ran([self._alone(calls[0], _why_alone(calls[0]))], as_one=True)
        arguments = [call.arguments for call in calls if call.arguments is not None]
        method = calls[0].method
        fitting = self.recovery.most(method, Inputs(arguments[0].leaves), [each.rows for each in arguments])
        if fitting < len(calls):
            ran = self.run(calls[:fitting])
            return Ran([*ran.outcomes, *[None] * (len(calls) - fitting)], as_one=ran.as_one)
        # Calls of few samples beside one of many, as fused requests make it, are a kind of their own.
        is_even = all(each.rows == arguments[0].rows for each in arguments)
        kind = (arguments[0].key, is_even, joining.dtypes(arguments))
        seen = method.verified.get(kind)
        places = seen.places if seen is not None else frozenset()
        if seen is not None and (len(places) == arguments[0].variable or joining.varied(arguments) <= places):
            return self._joined(method, calls, arguments, seen.cuts)
        chosen = _telling(arguments, places)
        outcomes: list[Outcome | None] = [None] * len(calls)
        shown = self._verify(method, kind, [calls[index] for index in chosen], [arguments[index] for index in chosen])
        for index, outcome in zip(chosen, shown, strict=True):
            outcomes[index] = outcome
        return Ran(outcomes)

    def _alone(self, call: Call, why: Lone) -> Outcome:
        def compute() -> Any:
            call.overlay.put_on()
            try:
                return call.method.original(*call.args, **call.kwargs)
            finally:
                call.overlay.take_off()

        began = time.perf_counter()
        tried = self._execute([call], [call.args, call.kwargs], compute)
        self._count([call], time.perf_counter() - began)
        if call.together == 1:
            self.tallies[str(call.method)].lone_calls[why] += 1
        return Outcome(tried.value, tried.error)

    def _joined(self, method: Method, calls: list[Call], arguments: list[Arguments], cuts: Layout) -> Ran:
        def compute() -> list[Any]:
            # What the component draws for all is nobody's own.
            randomness.put_away()
            args, kwargs = joining.join(arguments)
            return splitting.split(method.original(*args, **kwargs), [each.rows for each in arguments], cuts)

        began = time.perf_counter()
        tried = self._execute(calls, [each.leaves for each in arguments], compute)
        if tried.apart is not None:
            return Ran(self._apart(calls, tried.apart))
        if tried.error is not None:
            # One request's values, maybe: only those that fail alone fail.
            logger.debug("a joined call of %s failed and runs one by one: %s", method, type(tried.error).__name__)
            # It pins every tensor of its frames.
            del tried
            return Ran([self._alone(call, Lone.VERIFYING) for call in calls])
        self._count(calls, time.perf_counter() - began)
        return Ran([Outcome(result) for result in tried.value], as_one=True)

    def _apart(self, calls: list[Call], rung: Rung) -> list[Outcome | None]:
        """Outcomes of calls that there is no memory for together."""
        half = len(calls) // 2
        outcomes = [*self.run(calls[:half]).outcomes, *self.run(calls[half:]).outcomes]
        came = [
            call for call, outcome in zip(calls, outcomes, strict=True) if outcome is not None and outcome.error is None
        ]
        if came:
            self.recovery.helped(calls[0].method, rung)
        for call in came:
            call.costs.recoveries[rung] = None
        return outcomes

    def _execute(self, calls: Sequence[Call], values: Iterable[Any], compute: Callable[[], Any]) -> Tried:
        """Computes for requests: all that a component does for them is done here, and is recovered here.

        `values` are what `compute` passes to the component.
        """
        is_exact = any(call.lone is Lone.FORBIDDEN for call in calls)
        requests = sum(call.together for call in calls)
        inputs = Inputs(values, calls=len(calls))
        rows = sum(call.arguments.rows if call.arguments is not None else inputs.rows for call in calls)
        tried = self.recovery.run(Trial(calls[0].method, requests, rows, inputs, is_exact, compute))
        if tried.helped is not None:
            for call in calls:
                call.costs.recoveries[tried.helped] = None
        return tried

    def _verify(self, method: Method, kind: Kind, calls: list[Call], arguments: list[Arguments]) -> list[Outcome]:
        """Runs the calls alone, then joined, and remembers whether that came to the same."""
        outcomes = [self._alone(call, Lone.VERIFYING) for call in calls]
        if any(outcome.error is not None for outcome in outcomes):
            return outcomes
        randomness.put_away()
        try:
            args, kwargs = joining.join(arguments)
            joined = method.original(*args, **kwargs)
            cuts = splitting.layout(joined, [alone.value for alone in outcomes])
            results = splitting.split(joined, [each.rows for each in arguments], cuts)
            difference = splitting.worst(
                splitting.difference(part, alone.value) for part, alone in zip(results, outcomes, strict=True)
            )
        except NotJoinableError:
            return outcomes
        except Exception as error:
            if exhaustion.is_out_of_memory(error):
                return outcomes
            logger.debug("a joined call of %s fails: %s", method, type(error).__name__)
            cuts, difference = None, math.inf
        if difference <= 1:
            self.counts["verified_kinds"] += kind not in method.verified
            self.tallies[str(method)].verified(difference, is_new=kind not in method.verified)
            known = method.verified.get(kind)
            places = joining.varied(arguments) | (known.places if known is not None else frozenset())
            method.verified[kind] = Verified(places, cuts)
        elif difference > 1:
            logger.debug("joined calls of %s differ from lone ones by %.2g of the tolerance", method, difference)
            self.counts["refused_kinds"] += 1
            self.tallies[str(method)].refused(difference)
            method.refused.add(arguments[0].key)
        return outcomes

    def _count(self, calls: list[Call], seconds: float) -> None:
        joined = sum(call.together for call in calls)
        self.sizes.observe(joined)
        tally = self.tallies[str(calls[0].method)]
        tally.calls += joined
        tally.joined_calls += joined if joined > 1 else 0
        self.counts["batches"] += 1
        self.counts["joined_calls"] += joined if joined > 1 else 0
        phase = calls[0].method.phase
        self.device_seconds[phase] += seconds
        for call in calls:
            call.costs.device_seconds += seconds
            call.costs.phases.note(phase, seconds)
            call.costs.max_joined = max(call.costs.max_joined, joined)
            call.costs.joined_calls += joined > 1
            call.costs.batch_sizes[joined] += 1


def _why_alone(call: Call) -> Lone:
    if call.arguments is None:
        return call.lone
    return Lone.REFUSED if call.key is None else Lone.UNMATCHED


def _telling(calls: list[Arguments], seen: frozenset[int]) -> list[int]:
    """Positions of few calls that show what a batch of them all would: two numbers of rows, each place that differs."""
    rows = [call.rows for call in calls]
    chosen = {rows.index(number) for number in sorted(set(rows))[:2]}
    for place in joining.varied(calls) - seen:
        chosen |= {0, next(index for index, call in enumerate(calls) if place in joining.varied([calls[0], call]))}
    return sorted(chosen if len(chosen) > 1 else {0, 1})

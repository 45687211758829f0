"""The cooperative loop: one thread runs all requests, and component calls are where they take turns.

Each request is diffusers' own `__call__` in a greenlet. When it calls a component the call comes here, the loop picks
which calls run next, runs them as a batch, and gives each request its result, upon which it goes on to its next call.
Nothing else on this thread switches, so requests need no locks against each other.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import greenlet
import torch
from torch import nn

from . import joining
from .batches import Batches, Call, Costs, Outcome, Ran
from .coalescing import Coalescing, Pending
from .construction import Construction
from .embeddings import Embeddings
from .fairness import Entrant
from .fusing import Fusing
from .overlay import Overlay
from .randomness import Randomness
from .recovery import Recovery
from .residency import Claim, Residency, Visit
from .seam import Caller, Method
from .splitting import NotSplittableError
from .tallies import Lone

logger = logging.getLogger(__name__)

# Priority of what nobody waits for: it comes along with others, and else it runs when nothing else does.
LAST = -(1 << 31)


class Cancelled(BaseException):
    """Raised in a request at its next call. Not an Exception: pipelines catch those."""


class Work(Protocol):
    """What a request runs; all of it is called on the engine's thread."""

    @property
    def kind(self) -> Hashable:
        """Equal for work that may be fused; None for work that runs by itself."""

    @property
    def randomness(self) -> Randomness | None: ...

    def run(self) -> Any: ...

    def done(self) -> float:
        """What share of its steps is behind it, from 0 to 1; 0 while that is not known."""

    def fuse(self, others: Sequence[Any]) -> Work:
        """Work that comes to what this and others of its kind come to, at less cost."""

    def share(self, result: Any) -> list[Any]:
        """What fused work came to, as a result for each."""

    def leave(self) -> None:
        """Nobody waits for this any more; what it was fused into goes on."""

    def proof(self) -> tuple[Work, Work]:
        """Other work of this kind, and both as one."""

    def agrees(self, result: Any, alone: Sequence[Any]) -> bool:
        """Whether fused work came to what each comes to alone."""


class Request:
    """One piece of work that somebody waits for.

    `finish` is called on the engine's thread once, with the request and with what the work returned or raised; it must
    not take long.
    """

    def __init__(
        self,
        work: Work,
        finish: Callable[[Request, Outcome], None],
        *,
        entrant: Entrant | None = None,
        pipeline: str = "",
        alone: bool = False,
    ) -> None:
        self.work, self.finish, self.alone = work, finish, alone
        self.kind = None if alone else work.kind
        self.entrant, self.pipeline = entrant or Entrant(), pipeline
        self.is_cancelled = False
        self.arrival = 0.0
        self.costs = Costs()


class _Runner(Caller):
    """The greenlet of one request, or of several as one, and what their run has changed.

    `requests` are all of them, `waiting` those that were not cancelled meanwhile; `entrants` are theirs.
    """

    def __init__(self, requests: Sequence[Request], hub: greenlet.greenlet) -> None:
        first, *others = requests
        self.work = first.work.fuse([other.work for other in others]) if others else first.work
        super().__init__(self.work.run, hub)
        self.requests, self.waiting, self.hub = requests, list(requests), hub
        self.entrants = [request.entrant for request in requests]
        self.costs = Costs()
        for request in requests:
            request.costs = self.costs
        self.changes = self.overlay = Overlay(self.work.randomness)
        self.visit = Visit(first.pipeline)
        self.began = time.monotonic()
        self.pending: Pending[_Waiting] | None = None
        self.is_parked = False

    def remaining(self, now: float) -> float:
        """Seconds until it ends, at the pace that it had."""
        share = self.work.done()
        return (now - self.began) * (1 - share) / share if share else math.inf

    def call(self, method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.hub.switch((method, args, kwargs))

    def park(self) -> Any:
        return self.hub.switch(None)


class _Waiting:
    """A call, the greenlet that waits for it, and its claim to what it computes with.

    `embedding` is the key that its result may be kept under.
    """

    def __init__(self, runner: _Runner, call: Call, claim: Claim, embedding: Hashable) -> None:
        self.runner, self.call, self.claim, self.embedding = runner, call, claim, embedding


class Engine:
    """Runs requests. `submit`, `wake` and `cancel` may be called from any thread; the rest happens on its own."""

    def __init__(
        self,
        construction: Construction,
        residency: Residency,
        *,
        max_joined: int,
        device: torch.device,
        recovery: Recovery | None = None,
        embeddings: Embeddings | None = None,
    ) -> None:
        self._construction, self._residency, self._device = construction, residency, device
        residency.is_changed = self._is_changed
        self._coalescing: Coalescing[_Waiting] = Coalescing(max_joined)
        self._fusing = Fusing(max_joined, self._coalescing.worth)
        self.batches = Batches(recovery or Recovery(device))
        self.embeddings = embeddings or Embeddings(0, 0)
        self._running: set[_Runner] = set()
        # Calls whose components are not all on the device.
        self._absent: list[Pending[_Waiting]] = []
        self._inbox: deque[Request] = deque()
        # Those that wait for others of their kind.
        self._gathering: list[Request] = []
        self._answers: deque[tuple[Request, Any]] = deque()
        # What runs to prove something, and nobody waits for.
        self._shadows: set[Request] = set()
        self._shadow_ended = threading.Condition()
        self._woken, self._closed = threading.Event(), False
        self._turn_began = 0.0
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        self._inbox.append(request)
        self._woken.set()

    def wake(self, request: Request, value: Any) -> None:
        """Lets a request that is parked, or about to be, go on with this value."""
        self._answers.append((request, value))
        self._woken.set()

    def cancel(self, request: Request) -> None:
        """Raises Cancelled in the request where it stands; `finish` still gets called."""
        request.is_cancelled = True
        self._woken.set()

    def drop_proofs(self, pipeline: str) -> None:
        """Ends what nobody waits for of a pipeline whose weights are about to go; returns when none of it is left."""
        with self._shadow_ended:
            for shadow in self._shadows:
                if shadow.pipeline == pipeline:
                    self.cancel(shadow)
            self._shadow_ended.wait_for(
                lambda: self._closed or all(shadow.pipeline != pipeline for shadow in self._shadows)
            )

    @property
    def stops(self) -> Mapping[str, int]:
        """Batches by why they were not larger."""
        return {str(stop): batches for stop, batches in self._coalescing.stops.items()}

    @property
    def turn_seconds(self) -> float:
        """How long the present turn has taken, one batch of calls at most; 0 while there is nothing to do."""
        began = self._turn_began
        return time.monotonic() - began if began else 0.0

    def close(self) -> None:
        self._closed = True
        self._woken.set()
        with self._shadow_ended:
            self._shadow_ended.notify_all()
        self._thread.join()

    def _loop(self) -> None:
        try:
            self._run()
        except BaseException:
            # Without this thread no request would ever end. The front-end starts a dead worker again.
            logger.exception("the engine failed, and the worker ends")
            os._exit(1)

    def _run(self) -> None:
        # For the whole thread: interleaved `with no_grad()` blocks would restore each other's mode.
        torch.set_grad_enabled(False)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        hub = greenlet.getcurrent()
        while not self._closed:
            self._woken.clear()
            self._turn_began = time.monotonic()
            with self._construction.turn():
                is_busy = self._step(hub)
            self._turn_began = 0.0
            if not is_busy:
                self._woken.wait()

    def _step(self, hub: greenlet.greenlet) -> bool:
        """Starts what is new, drops what is cancelled, runs one batch; says whether there may be more to do."""
        self._start_new(hub)
        for runner in [runner for runner in self._running if any(one.is_cancelled for one in runner.waiting)]:
            self._cancel(runner)
        while self._answers:
            request, value = self._answers.popleft()
            for runner in [runner for runner in self._running if request in runner.waiting and runner.is_parked]:
                self._resume(runner, Outcome(value))
        self._take_present()
        if batch := self._enter(self._coalescing.next(time.monotonic())):
            self._run_batch(batch)
        return bool(len(self._coalescing) or self._inbox or self._gathering or self._answers)

    def _start_new(self, hub: greenlet.greenlet) -> None:
        """Those that have come and are of one kind may run as one."""
        arrived: dict[Hashable, list[Request]] = {}
        requests, self._gathering, now = self._gathering, [], time.monotonic()
        while self._inbox:
            request = self._inbox.popleft()
            request.arrival = now
            requests.append(request)
        for request in requests:
            if request.is_cancelled:
                request.finish(request, Outcome(error=Cancelled()))
            else:
                arrived.setdefault(request if request.kind is None else request.kind, []).append(request)
        for kind, requests in arrived.items():
            if self._gathers(kind, requests, now):
                self._gathering += requests
                continue
            if self._fusing.wants_proof(kind, len(requests)):
                self._prove(requests[0])
            for group in self._fusing.groups(kind, requests):
                runner = _Runner(group, hub)
                self._running.add(runner)
                for entrant in runner.entrants:
                    self._coalescing.enter(entrant)
                self._switch(runner, runner.switch)

    def _gathers(self, kind: Hashable, requests: Sequence[Request], now: float) -> bool:
        """Whether they wait for others; only while calls are pending, so that the device never does."""
        if not len(self._coalescing) or any(request.entrant.deadline is not None for request in requests):
            return False
        ends = (runner.remaining(now) for runner in self._running if runner.requests[0].kind == kind)
        return self._fusing.gathers(kind, len(requests), now - requests[0].arrival, ends, now)

    def _prove(self, request: Request) -> None:
        """Runs beside a request another one of its kind, and both as one, and compares."""
        like, both = request.work.proof()
        outcomes: dict[Work, Outcome] = {}

        def finished(one: Request, outcome: Outcome) -> None:
            outcomes[one.work] = outcome
            if outcome.error is not None:
                for other in shadows:
                    other.is_cancelled = True
            if len(outcomes) == 3:
                alone = outcomes[request.work], outcomes[like]
                is_equal = _verdict(*alone, outcomes[both], request.work.agrees)
                self._fusing.judge(request.kind, is_equal)
                if is_equal is not None:
                    self.batches.counts["fusible_kinds" if is_equal else "unfusible_kinds"] += 1

        def finish_first(one: Request, outcome: Outcome) -> None:
            finished(one, outcome)
            finish(one, outcome)

        def finish_shadow(one: Request, outcome: Outcome) -> None:
            finished(one, outcome)
            with self._shadow_ended:
                self._shadows.discard(one)
                self._shadow_ended.notify_all()

        finish, request.finish = request.finish, finish_first
        entrants = [Entrant("engine", priority=LAST) for _ in (like, both)]
        shadows = [
            Request(work, finish_shadow, entrant=entrant, pipeline=request.pipeline)
            for work, entrant in zip((like, both), entrants, strict=True)
        ]
        for shadow in shadows:
            shadow.kind = None
        with self._shadow_ended:
            self._shadows.update(shadows)
        self._inbox.extend(shadows)

    def _cancel(self, runner: _Runner) -> None:
        gone = [request for request in runner.waiting if request.is_cancelled]
        if len(gone) == len(runner.waiting):
            if runner.is_parked or (runner.pending is not None and self._discard(runner.pending)):
                self._resume(runner, Outcome(error=Cancelled()))
            return
        for request in gone:
            request.work.leave()
            self._leave(runner, request)
            request.finish(request, Outcome(error=Cancelled()))

    def _discard(self, pending: Pending[_Waiting]) -> bool:
        if pending in self._absent:
            self._absent.remove(pending)
        elif not self._coalescing.discard(pending):
            return False
        self._residency.release(pending.call.claim)
        return True

    def _take_present(self) -> None:
        """Lets calls take their turns whose components have come."""
        absent, self._absent = self._absent, []
        for pending in absent:
            claim = pending.call.claim
            if claim.error is not None:
                self._residency.release(claim)
                self._resume(pending.call.runner, Outcome(error=claim.error))
            elif self._residency.has(claim):
                self._coalescing.add(pending)
            else:
                self._absent.append(pending)

    def _enter(self, batch: list[Pending[_Waiting]]) -> list[Pending[_Waiting]]:
        """Those of a batch whose components are still there; the others wait until they have come back."""
        present: list[Pending[_Waiting]] = []
        for pending in batch:
            (present if self._residency.enter(pending.call.claim) else self._absent).append(pending)
        return present

    def _is_changed(self, module: nn.Module) -> bool:
        return any(runner.changes.touches(module) for runner in self._running)

    def _run_batch(self, batch: list[Pending[_Waiting]]) -> None:
        began = time.perf_counter()
        ran = self._guarded([pending.call.call for pending in batch])
        seconds = time.perf_counter() - began
        outcomes = list(zip(batch, ran.outcomes, strict=True))
        self._coalescing.put_back([pending for pending, outcome in outcomes if outcome is None])
        done = [pending for pending, outcome in outcomes if outcome is not None]
        self._coalescing.ran(done, seconds, as_one=ran.as_one)
        if len(batch) == 1 and ran.as_one:
            self._keep(batch[0].call, ran.outcomes[0])
        for pending in done:
            runner = pending.call.runner
            together = len(runner.requests)
            self._fusing.called(runner.requests[0].kind, pending.key, pending.rows // together, seconds)
            if share := runner.work.done():
                for entrant in runner.entrants:
                    entrant.remaining = runner.costs.device_seconds * (1 - share) / share
        for pending, outcome in outcomes:
            if outcome is not None:
                self._resume(pending.call.runner, outcome)
        # Now that the next calls have claimed what they need: a component does not leave between two steps.
        for pending, outcome in outcomes:
            self._residency.leave(pending.call.claim, is_over=outcome is not None)

    def _guarded(self, calls: list[Call]) -> Ran:
        """Whatever goes wrong beside the components' own errors, it is theirs who asked: this thread serves others."""
        try:
            return self.batches.run(calls)
        except Exception as error:
            logger.exception("a batch of %s failed", calls[0].method)
            return Ran([Outcome(error=error) for _ in calls])

    def _keep(self, waiting: _Waiting, outcome: Outcome | None) -> None:
        """Of a call that ran alone; where memory was short it may have run in parts."""
        if waiting.embedding is None or outcome is None or outcome.error is not None or waiting.call.costs.recoveries:
            return
        self.embeddings.keep(waiting.embedding, waiting.call.method, outcome.value, time.monotonic())

    def _resume(self, runner: _Runner, outcome: Outcome) -> None:
        """Lets a request go on, with the result of its call, until its next call or its end."""
        if outcome.error is not None:
            self._switch(runner, runner.throw, outcome.error)
        else:
            self._switch(runner, runner.switch, outcome.value)

    def _switch(self, runner: _Runner, switch: Callable[..., Any], *values: Any) -> None:
        runner.pending, runner.is_parked = None, False
        runner.changes.put_on()
        try:
            told = switch(*values)
        except BaseException as error:
            # A greenlet's last exception comes up here.
            self._end(runner, Outcome(error=error))
            return
        finally:
            runner.changes.take_off()
        if runner.dead:
            self._end(runner, Outcome(told))
        elif told is None:
            runner.is_parked = True
        else:
            self._add(runner, *told)

    def _add(self, runner: _Runner, method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        together = len(runner.requests)
        lone, arguments, embedding = self._why_alone(runner, method), None, None
        if lone is None or lone is Lone.UNMATCHED:
            embedding = self.embeddings.key(method, args, kwargs)
        if embedding is not None and (found := self.embeddings.find(embedding, method, time.monotonic())):
            self.batches.counts["embedding_hits"] += together
            runner.costs.phases.note(method.phase, 0.0)
            self._resume(runner, Outcome(found.value))
            return
        runner.costs.calls += 1
        self.batches.counts["calls"] += together
        if lone is None:
            arguments = joining.describe(method.parameters, args, kwargs)
        call = Call(method, args, kwargs, arguments, runner.changes, runner.costs, lone or Lone.UNBATCHED, together)
        rows = arguments.rows if arguments is not None else together
        claim = self._residency.claim(method.module, runner.visit, self._woken.set)
        runner.pending = Pending(_Waiting(runner, call, claim, embedding), call.key, runner.entrants, rows)
        if claim.is_present:
            self._coalescing.add(runner.pending)
        else:
            self._absent.append(runner.pending)

    def _why_alone(self, runner: _Runner, method: Method) -> Lone | None:
        if runner.requests[0].alone:
            return Lone.FORBIDDEN
        if runner.changes.touches(method.module):
            # What a request has changed is in force for its own calls only.
            return Lone.CHANGED
        # Nobody joins one that is by itself; how long fused ones take is worth knowing all the same.
        is_by_itself = len(self._running) == len(runner.requests) == 1 and not self._inbox
        return Lone.UNMATCHED if is_by_itself else None

    def _end(self, runner: _Runner, outcome: Outcome) -> None:
        self._running.discard(runner)
        if outcome.error is None:
            now = time.monotonic()
            self._fusing.ended(runner.requests[0].kind, now - runner.began, now)
        waiting = list(runner.waiting)
        for request in waiting:
            self._leave(runner, request)
        if len(runner.requests) == 1:
            for request in waiting:
                request.finish(request, outcome)
            return
        results: Sequence[Any] | None = None
        if outcome.error is None:
            try:
                results = runner.work.share(outcome.value)
            except NotSplittableError:
                logger.debug("what fused requests came to cannot be taken apart")
        if results is not None:
            self.batches.counts["fused_requests"] += len(runner.requests)
            for request, result in zip(runner.requests, results, strict=True):
                if request in waiting:
                    request.finish(request, Outcome(result))
        elif isinstance(outcome.error, Cancelled):
            for request in waiting:
                request.finish(request, outcome)
        else:
            # Out of memory, or one request's values: only those that fail alone fail.
            self._fusing.failed(runner.requests[0].kind, len(runner.requests))
            for request in waiting:
                request.kind = None
            self._inbox.extend(waiting)

    def _leave(self, runner: _Runner, request: Request) -> None:
        runner.waiting.remove(request)
        runner.entrants.remove(request.entrant)
        self._coalescing.leave(request.entrant)


def _verdict(alone: Outcome, like: Outcome, both: Outcome, agrees: Callable[..., bool]) -> bool | None:
    """Whether a proof holds; None when it shows nothing."""
    if alone.error is not None or like.error is not None or isinstance(both.error, Cancelled):
        return None
    if both.error is not None:
        return False
    try:
        return agrees(both.value, (alone.value, like.value))
    except Exception:
        logger.debug("what fused requests came to cannot be compared", exc_info=True)
        return False

"""The cooperative loop: one thread runs all requests, and component calls are where they take turns.

Each request is diffusers' own `__call__` in a greenlet. When it calls a component the call comes here, the loop picks
which calls run next, runs them as a batch, and gives each request its result, upon which it goes on to its next call.
Nothing else on this thread switches, so requests need no locks against each other.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import greenlet
import torch

from . import joining
from .batches import Batches, Call, Costs, Outcome
from .coalescing import Coalescing, Pending
from .construction import Construction
from .fairness import Entrant
from .overlay import Overlay
from .randomness import Randomness
from .seam import Caller, Method
from .tallies import Lone

logger = logging.getLogger(__name__)


class Cancelled(BaseException):
    """Raised in a request at its next call. Not an Exception: pipelines catch those."""


class Request:
    """One run of a pipeline.

    `run` is called on the engine's thread. `finish` is called there once, with the request and with what `run` returned
    or raised; it must not take long. `done` says what share of its steps is behind it, where that is known.
    """

    def __init__(
        self,
        run: Callable[[], Any],
        finish: Callable[[Request, Outcome], None],
        *,
        entrant: Entrant | None = None,
        alone: bool = False,
        randomness: Randomness | None = None,
        done: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.run, self.finish, self.alone, self.done = run, finish, alone, done
        self.entrant = entrant or Entrant()
        self.randomness = randomness
        self.is_cancelled = False
        self.costs = Costs()


class _Runner(Caller):
    """The greenlet of one request, and what the request has changed."""

    def __init__(self, request: Request, hub: greenlet.greenlet) -> None:
        super().__init__(request.run, hub)
        self.request, self.hub = request, hub
        self.changes = self.overlay = Overlay(request.randomness)
        self.pending: Pending[_Waiting] | None = None
        self.is_parked = False

    def call(self, method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.hub.switch((method, args, kwargs))

    def park(self) -> Any:
        return self.hub.switch(None)


class _Waiting:
    """A call, and the greenlet that waits for it."""

    def __init__(self, runner: _Runner, call: Call) -> None:
        self.runner, self.call = runner, call


class Engine:
    """Runs requests. `submit`, `wake` and `cancel` may be called from any thread; the rest happens on its own."""

    def __init__(self, construction: Construction, *, max_joined: int, device: torch.device) -> None:
        self._construction, self._device = construction, device
        self._coalescing: Coalescing[_Waiting] = Coalescing(max_joined)
        self.batches = Batches()
        self._running: set[_Runner] = set()
        self._inbox: deque[Request] = deque()
        self._answers: deque[tuple[Request, Any]] = deque()
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

    @property
    def turn_seconds(self) -> float:
        """How long the present turn has taken, one batch of calls at most; 0 while there is nothing to do."""
        began = self._turn_began
        return time.monotonic() - began if began else 0.0

    def close(self) -> None:
        self._closed = True
        self._woken.set()
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
        while self._inbox:
            request = self._inbox.popleft()
            if request.is_cancelled:
                request.finish(request, Outcome(error=Cancelled()))
            else:
                runner = _Runner(request, hub)
                self._running.add(runner)
                self._coalescing.enter(request.entrant)
                self._switch(runner, runner.switch)
        for runner in [runner for runner in self._running if runner.request.is_cancelled]:
            if runner.is_parked or (runner.pending is not None and self._coalescing.discard(runner.pending)):
                self._resume(runner, Outcome(error=Cancelled()))
        while self._answers:
            request, value = self._answers.popleft()
            for runner in [runner for runner in self._running if runner.request is request and runner.is_parked]:
                self._resume(runner, Outcome(value))
        if batch := self._coalescing.next(time.monotonic()):
            self._run_batch(batch)
        return bool(len(self._coalescing) or self._inbox or self._answers)

    def _run_batch(self, batch: list[Pending[_Waiting]]) -> None:
        began = time.perf_counter()
        ran = self.batches.run([pending.call.call for pending in batch])
        seconds = time.perf_counter() - began
        outcomes = list(zip(batch, ran.outcomes, strict=True))
        self._coalescing.put_back([pending for pending, outcome in outcomes if outcome is None])
        done = [pending for pending, outcome in outcomes if outcome is not None]
        self._coalescing.ran(done, seconds, as_one=ran.as_one)
        for pending in done:
            request = pending.call.runner.request
            if share := request.done():
                request.entrant.remaining = request.costs.device_seconds * (1 - share) / share
        for pending, outcome in outcomes:
            if outcome is not None:
                self._resume(pending.call.runner, outcome)

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
        request = runner.request
        request.costs.calls += 1
        self.batches.counts["calls"] += 1
        lone, arguments = self._why_alone(runner, method), None
        if lone is None:
            arguments = joining.describe(method.parameters, args, kwargs)
        call = Call(method, args, kwargs, arguments, runner.changes, request.costs, lone or Lone.UNBATCHED)
        rows = arguments.rows if arguments is not None else 1
        runner.pending = Pending(_Waiting(runner, call), call.key, request.entrant, rows)
        self._coalescing.add(runner.pending)

    def _why_alone(self, runner: _Runner, method: Method) -> Lone | None:
        if runner.request.alone:
            return Lone.FORBIDDEN
        if runner.changes.touches(method.module):
            # What a request has changed is in force for its own calls only.
            return Lone.CHANGED
        # Nobody joins one that is by itself.
        return Lone.UNMATCHED if len(self._running) == 1 and not self._inbox else None

    def _end(self, runner: _Runner, outcome: Outcome) -> None:
        self._running.discard(runner)
        self._coalescing.leave(runner.request.entrant)
        runner.request.finish(runner.request, outcome)

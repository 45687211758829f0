"""The cooperative loop: one thread runs all requests, and component calls are where they take turns.

Each request is diffusers' own `__call__` in a greenlet. When it calls a component the call comes here, the loop picks
which calls run next and joins those that fit, runs them, and gives each request its result, upon which it goes on to
its next call. Nothing else on this thread switches, so requests need no locks against each other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import greenlet
import torch

from . import joining
from .coalescing import Coalescing, Pending
from .construction import Construction
from .joining import Arguments, NotJoinableError
from .observations import Observations
from .overlay import Overlay
from .seam import Method

logger = logging.getLogger(__name__)

BATCH_SIZE_BOUNDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Cancelled(BaseException):
    """Raised in a request at its next call. Not an Exception: pipelines catch those."""


@dataclass(slots=True)
class Call:
    """One component call of one request, waiting to run."""

    request: Request
    method: Method
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arguments: Arguments | None

    @property
    def key(self) -> Hashable | None:
        """Equal for calls that may be joined; None for one that stands alone."""
        return None if self.arguments is None else (self.method.number, self.arguments.key)

    @property
    def rows(self) -> int:
        return 0 if self.arguments is None else self.arguments.rows


def _kind(calls: list[Call]) -> tuple[Hashable, frozenset[int]]:
    """What is verified before it is believed: a key, with the numbers of samples that come together under it."""
    return calls[0].key, frozenset(call.rows for call in calls)


class Request:
    """One run of a pipeline.

    `run` is called on the engine's thread. `finish` is called there once, with what `run` returned or raised; it must
    not raise, and must not take long.
    """

    def __init__(
        self,
        run: Callable[[], Any],
        finish: Callable[[Any, BaseException | None], None],
        *,
        priority: int = 0,
        alone: bool = False,
    ) -> None:
        self.run, self.finish, self.priority, self.alone = run, finish, priority, alone
        self.cancelled = False
        self.calls = self.joined_calls = self.max_joined = 0
        self.device_seconds = 0.0
        self.overlay = Overlay()


class _Greenlet(greenlet.greenlet):
    """A request's greenlet; `caller` and `overlay` are how torch's hooks find the request."""

    def __init__(self, request: Request, hub: greenlet.greenlet) -> None:
        super().__init__(self._run, hub)
        self.request, self.hub, self.overlay = request, hub, request.overlay
        self.caller = self
        self.pending: Pending[Call] | None = None
        self.error: BaseException | None = None

    def _run(self) -> Any:
        try:
            return self.request.run()
        except BaseException as error:
            self.error = error

    def call(self, method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.hub.switch((method, args, kwargs))


class Engine:
    """Runs requests. `submit` and `cancel` may be called from any thread; everything else happens on its own."""

    def __init__(self, construction: Construction, *, max_joined: int, device: torch.device) -> None:
        self._construction, self._device = construction, device
        self._coalescing: Coalescing[Call] = Coalescing(max_joined)
        self._running: dict[Request, _Greenlet] = {}
        self._inbox: deque[Request] = deque()
        self._woken, self._closed = threading.Event(), False
        # Kinds of joined call: those that were seen to agree with running alone, and those that never run joined again.
        self._verified: set[Hashable] = set()
        self._refused: set[Hashable] = set()
        self.batch_sizes = Observations(BATCH_SIZE_BOUNDS)
        self.counts: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        self._inbox.append(request)
        self._woken.set()

    def cancel(self, request: Request) -> None:
        """Raises Cancelled in the request where it stands; `finish` still gets called."""
        request.cancelled = True
        self._woken.set()

    def close(self) -> None:
        self._closed = True
        self._woken.set()
        self._thread.join()

    @property
    def verified_kinds(self) -> int:
        return len(self._verified)

    @property
    def refused_kinds(self) -> int:
        return len(self._refused)

    def _loop(self) -> None:
        # For the whole thread: interleaved `with no_grad()` blocks would restore each other's mode.
        torch.set_grad_enabled(False)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        hub = greenlet.getcurrent()
        while not self._closed:
            self._woken.clear()
            with self._construction.turn():
                busy = self._step(hub)
            if not busy:
                self._woken.wait()

    def _step(self, hub: greenlet.greenlet) -> bool:
        """Starts what is new, drops what is cancelled, runs one batch; says whether there may be more to do."""
        while self._inbox:
            request = self._inbox.popleft()
            self._running[request] = runner = _Greenlet(request, hub)
            if request.cancelled:
                self._end(request, None, Cancelled())
            else:
                self._resume(runner)
        for request in [request for request in self._running if request.cancelled]:
            runner = self._running[request]
            if runner.pending is not None and self._coalescing.discard(runner.pending):
                self._resume(runner, error=Cancelled())
        if batch := self._coalescing.next():
            self._execute(self._sample(batch))
        return bool(len(self._coalescing) or self._inbox)

    def _resume(self, runner: _Greenlet, value: Any = None, error: BaseException | None = None) -> None:
        """Lets a request go on until its next call or its end."""
        request, runner.pending = runner.request, None
        request.overlay.put_on()
        try:
            told = runner.throw(error) if error is not None else runner.switch(value) if runner else runner.switch()
        finally:
            request.overlay.take_off()
        if runner.dead:
            self._end(request, told, runner.error)
            return
        method, args, kwargs = told
        request.calls += 1
        self.counts["calls"] += 1
        # What a request has changed is in force for its own calls only.
        solo = request.alone or bool(request.overlay)
        arguments = None if solo else joining.describe(method.parameters, args, kwargs)
        call = Call(request, method, args, kwargs, arguments)
        key = call.key if call.key not in self._refused else None
        runner.pending = Pending(call, key, request.priority)
        self._coalescing.add(runner.pending)

    def _end(self, request: Request, value: Any, error: BaseException | None) -> None:
        del self._running[request]
        if error is not None:
            # The frames of a live exception pin every tensor in them.
            error = error.with_traceback(None) if isinstance(error, Cancelled) else error
        try:
            request.finish(value, error)
        except Exception:
            logger.exception("a request's finish failed")

    def _sample(self, batch: list[Pending[Call]]) -> list[Call]:
        """The batch's calls; of a new kind, only as many as show whether it may be joined. The others go next."""
        calls = [pending.call for pending in batch]
        if len(calls) > 2 and _kind(calls) not in self._verified:
            first_of_each = {call.rows: index for index, call in reversed(list(enumerate(calls)))}
            chosen = sorted({0, 1} if len(first_of_each) == 1 else first_of_each.values())
            self._coalescing.put_back([pending for index, pending in enumerate(batch) if index not in chosen])
            calls = [calls[index] for index in chosen]
        return calls

    def _execute(self, calls: list[Call]) -> None:
        results: list[Any] | None = None
        if len(calls) > 1:
            results = self._run_joined(calls)
        if results is not None:
            for call, result in zip(calls, results, strict=True):
                self._resume(self._running[call.request], result)
            return
        for call in calls:
            self._run_alone(call)

    def _run_alone(self, call: Call) -> None:
        request, error = call.request, None
        result = None
        begin = time.perf_counter()
        request.overlay.put_on()
        try:
            result = call.method.original(*call.args, **call.kwargs)
        except Exception as raised:
            error = raised
        finally:
            request.overlay.take_off()
        self._count([request], time.perf_counter() - begin)
        self._resume(self._running[request], result, error)

    def _run_joined(self, calls: list[Call]) -> list[Any] | None:
        """Results of the calls run as one; None when they have to run one by one."""
        method, kind = calls[0].method, _kind(calls)
        begin = time.perf_counter()
        try:
            args, kwargs = joining.join([call.arguments for call in calls if call.arguments is not None])
            results = joining.split(method.original(*args, **kwargs), [call.rows for call in calls])
            if kind not in self._verified:
                results = self._verify(calls, results)
                self._verified.add(kind)
                return results
        except NotJoinableError as error:
            logger.debug("calls of %s never run joined: %s", method, error)
            self._refused.add(kind[0])
            return None
        except Exception as error:
            # Out of memory, or one request's values: run one by one, and only those that fail alone fail.
            logger.debug("a joined call of %s failed and runs one by one: %s", method, type(error).__name__)
            return None
        self._count([call.request for call in calls], time.perf_counter() - begin)
        return results

    def _verify(self, calls: list[Call], joined: list[Any]) -> list[Any]:
        """Runs a new kind of joined call alone as well. Raises NotJoinableError unless both come to the same.

        The lone results are what the requests get.
        """
        alone = []
        for call in calls:
            begin = time.perf_counter()
            alone.append(call.method.original(*call.args, **call.kwargs))
            self._count([call.request], time.perf_counter() - begin)
        worst = max(joining.difference(left, right) for left, right in zip(joined, alone, strict=True))
        if not worst <= 1:
            raise NotJoinableError(f"the result differs from running alone by {worst:.2g} of the tolerance")
        return alone

    def _count(self, requests: list[Request], seconds: float) -> None:
        joined = len(requests)
        self.batch_sizes.observe(joined)
        self.counts["batches"] += 1
        for request in requests:
            request.device_seconds += seconds
            request.max_joined = max(request.max_joined, joined)
            if joined > 1:
                request.joined_calls += 1
                self.counts["joined_calls"] += 1

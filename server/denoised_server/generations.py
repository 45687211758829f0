"""Generations in flight: each a task that makes events, and a log of them that callers read."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from functools import partial

from denoised.errors import (
    DenoisedError,
    GenerationCancelledError,
    GenerationNotFoundError,
    InternalError,
    InvalidFieldError,
    JournalUnavailableError,
    PipelineNotFoundError,
    QueueFullError,
    WorkerLostError,
    WorkersDrainedError,
)

from . import arguments, callers, forecast, quotas, request_context
from .admission import MIN_RETRY_SECONDS
from .background import Background
from .callers import Caller
from .course import CourseNotes
from .detached import Detached
from .eventlog import Numbered, behind
from .executor import Executor
from .forecast import Forecast
from .gate import Gate
from .generation import Generation, GenerationEvent, GenerationView, Making, Started, Summary, Terms
from .handles import MAX_REQUEST_ID, Handle
from .messages import Finished, Generate, Output, PhaseBegan, Preview, Progress, Ready, Reply, StepEnd
from .observer import Observer
from .paging import page
from .quotas import Quotas
from .replays import Refusals, Verdict, digest, refusal

logger = logging.getLogger(__name__)

PREFIX = "generations/"
NAME = re.compile(r"generations/[a-z][a-z0-9-]{0,62}")
# Between two tries to keep a result.
KEEP_SECONDS = 1.0
SEED_BITS = 32
# What gRPC may take from the end of a call's messages to the end of the call.
LEAVING_SECONDS = 0.5


class Generations:
    """Runs pipelines, no more on a worker at a time than its gate admits, and again when a worker dies.

    `bring_back` returns with a handle's pipeline live on a worker, `check_drained` raises where there will be none for
    it, `resumed` returns when there is one again, `missing` hears that the worker does not hold it after all, `changed`
    is called after any change, and `ready` says what a worker is.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        bring_back: Callable[[Handle], Awaitable[None]],
        check_drained: Callable[[], None],
        resumed: Callable[[], Awaitable[None]],
        missing: Callable[[Handle], None],
        changed: Callable[[], None],
        ready: Callable[[str], Ready],
        observer: Observer,
        max_running: int,
        max_waiting: int,
        max_pixels: int,
        callback_timeout: float,
        detached: Detached,
    ) -> None:
        self._executor = executor
        self._detached = detached
        self._quotas = Quotas()
        self._background = Background()
        self._bring_back = bring_back
        self._check_drained = check_drained
        self._resumed = resumed
        self._missing = missing
        self._changed = changed
        self._ready = ready
        self._observer = observer
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._max_pixels = max_pixels
        self._callback_timeout = callback_timeout
        self._gates: dict[str, Gate] = {}
        self._running: dict[str, Generation] = {}
        self._requests: dict[tuple[str, str], Generation] = {}
        self._refusals = Refusals()
        self._forecast = Forecast()
        self._last_number = 0

    def __bool__(self) -> bool:
        return bool(self._running)

    def gate(self, worker: str) -> Gate:
        """The gate before a worker, made when it is first asked for."""
        if worker not in self._gates:
            self._gates[worker] = Gate(
                worker, max_running=self._max_running, max_waiting=self._max_waiting, observer=self._observer
            )
        return self._gates[worker]

    def counts(self) -> Counter[str]:
        """How many there are of each pipeline, by its name."""
        return Counter(generation.handle.name for generation in self._running.values())

    def runs_on(self, worker: str, handle: Handle | None = None) -> bool:
        """Whether a generation, or one of a pipeline, has begun there and not ended."""
        return any(
            generation.worker == worker and handle in (None, generation.handle) for generation in self._running.values()
        )

    def interrupt(self, error: DenoisedError, chosen: Callable[[Generation], bool]) -> None:
        """Ends those that are chosen."""
        for generation in tuple(self._running.values()):
            if chosen(generation):
                generation.interrupt(error)

    def lose(self, worker: str, *, is_busy: bool) -> None:
        """Records which ran on a worker that died; `is_busy` says that it did something else, too."""
        running = [generation for generation in self._running.values() if generation.worker == worker]
        for generation in running:
            generation.was_alone = len(running) == 1 and not is_busy

    async def stop(self) -> None:
        await self._background.stop()

    # What callers ask

    async def generate(
        self, handle: Handle, command: Generate, terms: Terms, replies: AsyncIterator[Reply] | None = None
    ) -> AsyncGenerator[Numbered[GenerationEvent], None]:
        """Runs a pipeline. When nobody reads its events any more, it ends at its next step, unless it is detached.

        Each StepEnd takes the next of the replies.
        """
        _check_terms(terms, replies)
        events = self._join(command, terms)
        if events is None:
            generation = self._make(handle, command, terms)
            events = self._read(generation)
            if terms.detached:
                await self._accept(generation)
            self._begin(generation)
            if replies is not None:
                generation.listen(self._listen(generation, replies))
        async with aclosing(events):
            async for event in events:
                yield event

    async def resume(self, name: str, after: int, caller: Caller) -> AsyncGenerator[Numbered[GenerationEvent], None]:
        """The events of a generation after one of them."""
        self.get(name, caller)
        if (generation := self._running.get(name)) is not None:
            events = self._read(generation, after)
        else:
            events = self._read_kept(name, after)
        async with aclosing(events):
            async for event in events:
                yield event

    def get(self, name: str, caller: Caller) -> GenerationView:
        if not NAME.fullmatch(name):
            raise InvalidFieldError.of(
                "name",
                f"{name[:80]!r} is not the name of a generation.",
                hint='Names have the form "generations/{id}".',
            )
        generation = self._running.get(name)
        view = generation.view() if generation is not None else self._detached.find(name)
        if view is not None and caller.owns(view.owner):
            return view
        raise GenerationNotFoundError(
            f"There is no {name}; its result may not be kept any more.",
            hint="Results of detached generations are kept for as long as the daemon's setting results_ttl says.",
            metadata={"generation": name},
        )

    def page(self, *, size: int, token: str, caller: Caller) -> tuple[list[GenerationView], str]:
        """One page of those that wait or run, and of those that are kept, oldest first."""
        views = {view.name: view for view in self._detached}
        views |= {name: generation.view() for name, generation in self._running.items()}
        ordered = sorted(filter(lambda view: caller.owns(view.owner), views.values()), key=lambda view: view.number)
        return page(ordered, key=lambda view: view.number, size=size, token=token)

    def cancel(self, name: str, caller: Caller) -> GenerationView:
        """Ends a generation at its next step."""
        self.get(name, caller)
        if (generation := self._running.get(name)) is not None:
            generation.interrupt(GenerationCancelledError(f"{name} was cancelled.", metadata={"generation": name}))
        return self.get(name, caller)

    async def restore(self, find: Callable[[str], Handle]) -> None:
        """Runs what an earlier process accepted and did not finish."""
        for pending in await self._detached.open():
            try:
                handle = find(pending.view.pipeline)
            except DenoisedError as error:
                await self._detached.refuse(pending, error, time.time())
                continue
            view = pending.view
            generation = Generation(
                name=view.name,
                number=view.number,
                handle=handle,
                asked=pending.asked,
                command=pending.command,
                terms=Terms(pending.request_id, detached=True, owner=view.owner),
                create_time=view.create_time,
                notes=CourseNotes(handle.recipe.spec.repo_id, pending.command.output_type),
                caller=Caller(view.owner),
            )
            self._add(generation)
            self._begin(generation)
            logger.info("%s is run again", view.name)
        kept = (view.number for view in self._detached)
        self._last_number = max((self._last_number, *kept))

    def leave_for_later(self, error: DenoisedError, chosen: Callable[[Generation], bool]) -> None:
        """Ends those that are chosen; the detached ones of them are run by the next process."""
        for generation in tuple(self._running.values()):
            if chosen(generation) and not generation.is_over:
                generation.is_left_for_later = generation.terms.detached
                generation.interrupt(error)

    # Steps of the above

    async def _read(self, generation: Generation, after: int = 0) -> AsyncGenerator[Numbered[GenerationEvent], None]:
        generation.readers += 1
        try:
            # What was just begun goes to its worker before its first event goes to the caller.
            await asyncio.sleep(0)
            async with aclosing(generation.log.read(after)) as events:
                async for event in events:
                    yield event
        finally:
            generation.readers -= 1
            if not (generation.readers or generation.terms.detached):
                await generation.leave()

    async def _read_kept(self, name: str, after: int) -> AsyncGenerator[Numbered[GenerationEvent], None]:
        events, error = await self._detached.read(name)
        for event in behind(events, after):
            yield event
        if error is not None:
            raise error

    def _join(self, command: Generate, terms: Terms) -> AsyncGenerator[Numbered[GenerationEvent], None] | None:
        if not terms.request_id:
            return None
        running = self._requests.get(terms.key)
        if running is not None and (running.readers or running.terms.detached):
            found, is_same = self._read(running), digest(running.asked) == digest(command)
        else:
            view, is_same = self._detached.find_request(terms, command)
            if view is None:
                return None
            found = self._read_kept(view.name, 0)
        if not is_same:
            raise InvalidFieldError.of(
                "request_id", "it was sent with another request.", hint="Send a fresh UUID with each new request."
            )
        return found

    def _make(self, handle: Handle, asked: Generate, terms: Terms) -> Generation:
        caller = callers.current()
        quotas.check_priority(caller, asked.priority)
        self._check(handle, asked, caller)
        if not handle.worker:
            self._check_drained()
        self._refusals.check(asked, time.time())
        self._check_deadline(handle, asked, caller)
        command = asked
        if command.callbacks:
            command = replace(command, conversation=secrets.token_hex(16))
        if not command.seeds and not command.generators:
            # Drawn here, so that a run that has to be repeated makes the same images.
            command = replace(command, seeds=(secrets.randbits(SEED_BITS),))
        name = f"{PREFIX}g{secrets.token_hex(12)}"
        notes = CourseNotes(handle.recipe.spec.repo_id, command.output_type)
        generation = Generation(name, self._last_number + 1, handle, asked, command, terms, time.time(), notes, caller)
        position = None if handle.worker else self._place_in_queue()
        self._quotas.enter(caller)
        generation.is_counted_waiting = True
        self._add(generation)
        if position is not None:
            generation.queued(position)
        return generation

    def _add(self, generation: Generation) -> None:
        generation.log.put(Started(generation.name, generation.command.seeds))
        self._last_number = max(self._last_number, generation.number)
        self._running[generation.name] = generation
        if generation.terms.request_id:
            self._requests[generation.terms.key] = generation
        generation.handle.pins += 1
        self._changed()

    async def _accept(self, generation: Generation) -> None:
        try:
            await self._detached.accept(generation)
        except BaseException as error:
            # Others may have joined by its request_id.
            generation.log.end(error if isinstance(error, DenoisedError) else InternalError("It was not accepted."))
            self._remove(generation)
            raise

    def _begin(self, generation: Generation) -> None:
        generation.begin(partial(self._run, generation), ended=partial(self._ended, generation))

    def _place_in_queue(self) -> int:
        """The gate of a worker bounds its queue; before there is a worker, no more wait than one could take at once."""
        waiting = sum(not (other.worker or other.handle.worker) for other in self._running.values())
        if waiting >= self._max_running + self._max_waiting:
            raise QueueFullError(
                f"{waiting} requests are waiting for pipelines that are being loaded.",
                hint="Try again later, or raise the daemon's setting max_waiting.",
                retry_after=MIN_RETRY_SECONDS,
            )
        return waiting

    async def _run(self, generation: Generation) -> None:
        while not await self._survive(generation):
            generation.worker, generation.has_begun = "", False

    async def _survive(self, generation: Generation) -> bool:
        """Runs it to its end; returns False where its worker died and it is to be run again."""
        generation.was_alone = False
        try:
            await self._run_once(generation)
        except WorkerLostError:
            if generation.command.callbacks:
                # A replay would ask the caller's callbacks again what they have replied to.
                raise
            verdict = generation.deaths.judge(was_alone=generation.was_alone)
            logger.warning("a worker died under %s: %s", generation.name, verdict.name)
            if verdict is Verdict.REFUSE:
                self._refusals.remember(generation.asked, time.time())
                raise refusal() from None
            if verdict is Verdict.GIVE_UP:
                raise
            self._observer.generation_replayed()
            generation.must_run_alone = verdict is Verdict.REPLAY_ALONE
            return False
        return True

    async def _run_once(self, generation: Generation) -> None:
        handle, command = generation.handle, generation.command
        began, has_retried, has_waited = time.monotonic(), False, False
        while not generation.worker:
            if not handle.worker:
                with generation.notes.phase("load"):
                    await self._have_live(generation)
            # Again: before its first load, the pipeline's parameters were not known.
            self._check(handle, command, generation.caller)
            worker, loaded = handle.worker, handle.loaded
            assert loaded is not None, "what is on a worker was loaded"
            generation.demand = forecast.demand(command, handle.recipe.spec, loaded)
            generation.cost = self._forecast.cost(generation.demand, time.monotonic())
            gate = self.gate(worker).enter(
                priority=command.priority,
                caller=generation.caller,
                cost=generation.cost,
                moved=generation.queued,
                stays=partial(_is_on, handle, worker),
                alone=generation.must_run_alone,
                again=has_waited or generation.deaths.count > 0,
            )
            async with AsyncExitStack() as stack:
                with generation.notes.phase("queue"):
                    await stack.enter_async_context(gate)
                has_waited = True
                # The worker may have died while this one waited; then what it held is built anew.
                if handle.worker == worker:
                    generation.admitted(worker)
                    self._leave_line(generation)
                    request = request_context.current()
                    request.worker = worker
                    request.pipeline_class = loaded.pipeline_class
                    queue_seconds = time.monotonic() - began
                    self._observer.generation_admitted(handle.recipe.spec.repo_id, queue_seconds)
                    try:
                        await self._relay(generation, queue_seconds)
                    except PipelineNotFoundError:
                        if has_retried or generation.has_begun:
                            raise
                        logger.warning("%s does not hold %s, which is built again", worker, handle.name)
                        generation.worker, has_retried = "", True
                        # Another generation may have found out first.
                        if handle.loaded is loaded:
                            self._missing(handle)

    async def _have_live(self, generation: Generation) -> None:
        while True:
            try:
                return await self._bring_back(generation.handle)
            except WorkersDrainedError:
                if not generation.terms.detached:
                    raise
                # Its caller was told that it runs without him: later, then, here or in the next process.
                await self._resumed()

    async def _listen(self, generation: Generation, replies: AsyncIterator[Reply]) -> None:
        try:
            async for reply in replies:
                if not (worker := generation.answered()):
                    raise InvalidFieldError.of(
                        "reply", "no callback was asked.", hint="Send one for each `step_end`, after it."
                    )
                command = replace(reply, conversation=generation.command.conversation)
                async with aclosing(self._executor.submit(worker, command)) as nothing:
                    async for _ in nothing:
                        pass
            # The messages of a caller who leaves end a moment before its call: that is no error of his.
            await asyncio.sleep(LEAVING_SECONDS)
            generation.hears = False
            if generation.is_asking:
                raise _deaf()
        except DenoisedError as error:
            generation.interrupt(error)
        except Exception:
            # What gRPC raises when the call ends, which ends the generation too.
            logger.debug("no more replies", exc_info=True)

    async def _relay(self, generation: Generation, queue_seconds: float) -> None:
        worker, command, handle = generation.worker, generation.command, generation.handle
        if command.timeout is not None:
            command = replace(command, timeout=generation.left())
        assert handle.loaded is not None, "what runs is on a worker"
        making = Making(command, handle.recipe, handle.loaded, self._ready(worker))
        async with aclosing(self._executor.submit(worker, command)) as events:
            async for event in events:
                generation.has_begun = True
                match event:
                    case Progress() | Output():
                        if generation.advance(event):
                            generation.notes.note(event)
                    case PhaseBegan() | Preview():
                        generation.advance(event)
                    case StepEnd():
                        if not generation.hears:
                            raise _deaf()
                        generation.ask(event, patience=self._callback_timeout)
                    case Finished():
                        generation.notes.note(event)
                        if generation.demand is not None and not command.callbacks:
                            # With callbacks, most of the time would be the caller's.
                            self._forecast.learn(generation.demand, event, time.monotonic())
                        summary = Summary(queue_seconds, event, command.seeds, making, generation.deaths.count)
                        generation.log.put(summary)
                    case _:
                        raise InternalError(f"{worker} answered a Generate with a {type(event).__name__}.")

    def _check(self, handle: Handle, command: Generate, caller: Caller) -> None:
        if handle.loaded is not None:
            arguments.check(command, handle.loaded.parameters, max_pixels=self._max_pixels)
            quotas.check_work(caller, command.arguments, handle.loaded.parameters)

    def _check_deadline(self, handle: Handle, command: Generate, caller: Caller) -> None:
        """Refuses what cannot be done in time, as far as anything is known of it."""
        if command.timeout is None or handle.loaded is None:
            return
        demand = forecast.demand(command, handle.recipe.spec, handle.loaded)
        gate = self._gates.get(handle.worker)
        wait = gate.wait_of_next(priority=command.priority, caller=caller) if gate else 0.0
        forecast.check_deadline(command.timeout, self._forecast.cost(demand, time.monotonic()), wait)

    def _leave_line(self, generation: Generation) -> None:
        if generation.is_counted_waiting:
            generation.is_counted_waiting = False
            self._quotas.leave(generation.caller)

    def _ended(self, generation: Generation) -> None:
        generation.handle.last_use_time = time.time()
        loaded = generation.handle.loaded
        self._observer.generation_ended(generation.notes.end(generation.outcome, loaded.task if loaded else ""))
        if generation.terms.detached and generation.is_over and not generation.is_left_for_later:
            self._background.spawn(self._finish(generation), name=f"result of {generation.name}")
        else:
            self._remove(generation)

    async def _finish(self, generation: Generation) -> None:
        """Keeps a result, however long the journal cannot have it; callers who come meanwhile get it from memory."""
        try:
            while True:
                try:
                    return await self._detached.finish(generation)
                except JournalUnavailableError as error:
                    logger.error("the result of %s is not kept yet: %s", generation.name, error)
                    await asyncio.sleep(KEEP_SECONDS)
        finally:
            self._remove(generation)

    def _remove(self, generation: Generation) -> None:
        del self._running[generation.name]
        self._leave_line(generation)
        if self._requests.get(generation.terms.key) is generation:
            del self._requests[generation.terms.key]
        generation.handle.pins -= 1
        self._changed()


def _is_on(handle: Handle, worker: str) -> bool:
    return handle.worker == worker


def _check_terms(terms: Terms, replies: AsyncIterator[Reply] | None) -> None:
    if len(terms.request_id) > MAX_REQUEST_ID:
        raise InvalidFieldError.of("request_id", f"it is longer than {MAX_REQUEST_ID} characters.", hint="Send a UUID.")
    if replies is not None and (terms.request_id or terms.detached):
        field = "request_id" if terms.request_id else "on_disconnect"
        raise InvalidFieldError.of(field, "a call with callbacks cannot do without its caller.", hint="Leave it unset.")


def _deaf() -> InvalidFieldError:
    return InvalidFieldError.of(
        "reply", "a callback was asked, and no reply can come any more.", hint="Keep the call open for sending."
    )

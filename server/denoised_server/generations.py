"""Generations in flight: each a task that makes events, and a channel that carries them to the caller."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial

from denoised.errors import DenoisedError, InternalError, InvalidFieldError, PipelineNotFoundError, QueueFullError

from . import arguments
from .admission import MIN_RETRY_SECONDS
from .channel import Channel
from .executor import Executor
from .gate import Gate
from .handles import Handle
from .messages import Finished, Generate, Loaded, Output, Progress, Ready, Recipe, Reply, StepEnd
from .observer import Observer

logger = logging.getLogger(__name__)

SEED_BITS = 32


@dataclass(frozen=True, slots=True)
class Queued:
    """The generation waits; so many will run before it."""

    position: int


@dataclass(frozen=True, slots=True)
class Making:
    """What outputs are made with and from: the pipeline as it was when the run began, and the worker."""

    command: Generate
    recipe: Recipe
    loaded: Loaded
    ready: Ready


@dataclass(frozen=True, slots=True)
class Summary:
    """The generation is over. Times in seconds; no seeds where the caller sent generator states."""

    queue_seconds: float
    finished: Finished
    seeds: tuple[int, ...]
    making: Making


GenerationEvent = Queued | Progress | StepEnd | Output | Summary


class _Generation:
    """Runs apart from its caller, so that it can be ended while the caller is busy with a slow connection."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self.events = Channel[GenerationEvent]()
        self.is_admitted = False
        self.has_begun = False
        # The worker that waits for a reply; empty while none does.
        self.asking = ""
        self.hears = True
        self._task: asyncio.Task[None]

    def begin(self, work: Callable[[], Awaitable[None]], ended: Callable[[], None]) -> None:
        """Starts the work, which puts its events into `events`; `ended` is called when nothing of it runs any more."""
        self._task = asyncio.create_task(self._run(work))
        self._task.add_done_callback(lambda _: ended())

    def interrupt(self, error: DenoisedError) -> None:
        """Ends it now; the caller gets the error."""
        self.events.end(error)
        self._task.cancel()

    async def leave(self) -> None:
        """Ends it because the caller is gone, or has everything."""
        self._task.cancel()
        await asyncio.wait([self._task])

    def queued(self, position: int) -> None:
        self.events.put(Queued(position))

    async def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception as error:
            self.events.end(error)
        else:
            self.events.end()


class Generations:
    """Runs pipelines, no more on a worker at a time than its gate admits.

    `bring_back` returns with a handle's pipeline live on a worker, `missing` hears that the worker does not hold it
    after all, `changed` is called after any change, and `ready` says what a worker is.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        bring_back: Callable[[Handle], Awaitable[None]],
        missing: Callable[[Handle], None],
        changed: Callable[[], None],
        ready: Callable[[str], Ready],
        observer: Observer,
        max_running: int,
        max_waiting: int,
        max_pixels: int,
    ) -> None:
        self._executor = executor
        self._bring_back = bring_back
        self._missing = missing
        self._changed = changed
        self._ready = ready
        self._observer = observer
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._max_pixels = max_pixels
        self._gates: dict[str, Gate] = {}
        self._running: set[_Generation] = set()

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
        return Counter(generation.handle.name for generation in self._running)

    def interrupt(self, error: DenoisedError, chosen: Callable[[Handle, bool], bool]) -> None:
        """Ends those for whose handle, and whether they were admitted, `chosen` says so."""
        for generation in tuple(self._running):
            if chosen(generation.handle, generation.is_admitted):
                generation.interrupt(error)

    async def generate(
        self, handle: Handle, command: Generate, replies: AsyncIterator[Reply] | None = None
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Runs a pipeline. Closing the generator ends the run at its next step, or where it waits for a reply.

        Each StepEnd takes the next of the replies.
        """
        self._check(handle, command)
        if command.callbacks:
            command = replace(command, conversation=secrets.token_hex(16))
        if not command.seeds and not command.generators:
            # Drawn here, so that a run that has to be repeated makes the same images.
            command = replace(command, seeds=(secrets.randbits(SEED_BITS),))
        generation = _Generation(handle)
        if not handle.worker:
            self._queue_for_load(generation)
        self._running.add(generation)
        handle.pins += 1
        self._changed()
        generation.begin(partial(self._run, generation, command), ended=partial(self._ended, generation))
        listening = None
        if replies is not None:
            listening = asyncio.create_task(self._listen(generation, command.conversation, replies))
        try:
            async for event in generation.events:
                yield event
        finally:
            if listening is not None:
                listening.cancel()
            await generation.leave()

    def _queue_for_load(self, generation: _Generation) -> None:
        """The gate of a worker bounds its queue; before there is a worker, no more wait than one could take at once."""
        waiting = sum(not (other.is_admitted or other.handle.worker) for other in self._running)
        if waiting >= self._max_running + self._max_waiting:
            raise QueueFullError(
                f"{waiting} requests are waiting for pipelines that are being loaded.",
                hint="Try again later, or raise the daemon's setting max_waiting.",
                retry_after=MIN_RETRY_SECONDS,
            )
        generation.queued(waiting)

    async def _run(self, generation: _Generation, command: Generate) -> None:
        handle, began, retried = generation.handle, time.monotonic(), False
        while not generation.is_admitted:
            await self._bring_back(handle)
            # Again: before its first load, the pipeline's parameters were not known.
            self._check(handle, command)
            worker, loaded = handle.worker, handle.loaded
            async with self.gate(worker).enter(priority=command.priority, moved=generation.queued):
                # The worker may have died while this one waited; then what it held is built anew.
                if handle.worker == worker:
                    generation.is_admitted = True
                    queue_seconds = time.monotonic() - began
                    self._observer.admitted(queue_seconds)
                    try:
                        await self._relay(generation, worker, command, queue_seconds)
                    except PipelineNotFoundError:
                        if retried or generation.has_begun:
                            raise
                        logger.warning("%s does not hold %s, which is built again", worker, handle.name)
                        generation.is_admitted, retried = False, True
                        # Another generation may have found out first.
                        if handle.loaded is loaded:
                            self._missing(handle)

    async def _listen(self, generation: _Generation, conversation: str, replies: AsyncIterator[Reply]) -> None:
        try:
            async for reply in replies:
                worker, generation.asking = generation.asking, ""
                if not worker:
                    raise InvalidFieldError.of(
                        "reply", "no callback was asked.", hint="Send one for each `step_end`, after it."
                    )
                command = replace(reply, conversation=conversation)
                async with aclosing(self._executor.submit(worker, command)) as nothing:
                    async for _ in nothing:
                        pass
            generation.hears = False
            if generation.asking:
                raise _deaf()
        except DenoisedError as error:
            generation.interrupt(error)
        except Exception:
            # What gRPC raises when the call ends, which ends the generation too.
            logger.debug("no more replies", exc_info=True)

    async def _relay(self, generation: _Generation, worker: str, command: Generate, queue_seconds: float) -> None:
        if command.timeout is not None:
            command = replace(command, timeout=command.timeout - queue_seconds)
        handle = generation.handle
        assert handle.loaded is not None, "what runs is on a worker"
        making = Making(command, handle.recipe, handle.loaded, self._ready(worker))
        async with aclosing(self._executor.submit(worker, command)) as events:
            async for event in events:
                generation.has_begun = True
                match event:
                    case Progress() | Output():
                        if isinstance(event, Output) and event.field == "images":
                            self._observer.images_made(image_count(event, command.output_type))
                        generation.events.put(event)
                    case StepEnd():
                        if not generation.hears:
                            raise _deaf()
                        generation.asking = worker
                        generation.events.put(event)
                    case Finished():
                        generation.events.put(Summary(queue_seconds, event, command.seeds, making))
                    case _:
                        raise InternalError(f"{worker} answered a Generate with a {type(event).__name__}.")

    def _check(self, handle: Handle, command: Generate) -> None:
        if handle.loaded is not None:
            arguments.check(command, handle.loaded.parameters, max_pixels=self._max_pixels)

    def _ended(self, generation: _Generation) -> None:
        self._running.discard(generation)
        generation.handle.pins -= 1
        generation.handle.last_use_time = time.time()
        self._changed()


def _deaf() -> InvalidFieldError:
    return InvalidFieldError.of(
        "reply", "a callback was asked, and no reply can come any more.", hint="Keep the call open for sending."
    )


def image_count(output: Output, output_type: str) -> int:
    """The images in one output: one picture each, or an array of all of them. Latents are none yet."""
    match output_type, output.artifact.shape:
        case "latent", _:
            return 0
        case "np" | "pt", (count, _, _, _):
            return count
    return 1

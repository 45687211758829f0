"""Builds in flight: pipelines on their way to a worker, and who waits for them."""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from denoised.errors import DenoisedError, InternalError, PipelineNotFoundError, WorkerLostError

from .background import Background
from .channel import Channel
from .executor import Executor
from .handles import Handle, State
from .messages import Access, Command, Derivation, Derive, Event, Load, Loaded, LoadProgress, Recipe, Unload, Unloaded
from .observer import Observer
from .recipes import identity

logger = logging.getLogger(__name__)

E = TypeVar("E", bound=Event)
NO_ACCESS = Access()
WAITING = "waiting for a worker"


async def answer(executor: Executor, worker: str, command: Command, kind: type[E]) -> E:
    """The event of this kind that a command is answered with."""
    async with aclosing(executor.submit(worker, command)) as events:
        found = [event async for event in events if isinstance(event, kind)]
    if not found:
        raise InternalError(f"{worker} did not answer a {type(command).__name__}.")
    return found[-1]


@dataclass(frozen=True, slots=True)
class Origin:
    """A pipeline that a worker holds, and what to derive from it."""

    worker: str
    pipeline: str
    derivation: Derivation


class _Build:
    """One recipe being built, once for all handles that want it; `origin` is a live pipeline to derive it from."""

    def __init__(self, key: Hashable, recipe: Recipe, origin: Origin | None, access: Access) -> None:
        self.key = key
        self.recipe = recipe
        self.origin = origin
        self.access = access
        self.worker = origin.worker if origin else ""
        # Who waits, and whether it would wait through an unload.
        self.waiting: dict[Handle, dict[Channel[LoadProgress], bool]] = {}
        self.lingering: set[Channel[LoadProgress]] = set()
        self.begun: dict[Handle, Loaded | None] = {}
        self.progress: LoadProgress | None = None
        # When each phase began, in order.
        self._phases: list[tuple[str, float]] = []
        self.task: asyncio.Task[None]

    @property
    def is_wanted(self) -> bool:
        return any(self.waiting.values())

    def report(self, progress: LoadProgress) -> None:
        if self.progress is None or self.progress.phase != progress.phase:
            self._phases.append((progress.phase, time.monotonic()))
        self.progress = progress
        for channels in self.waiting.values():
            for channel in channels:
                channel.put(progress)

    def phases(self) -> dict[str, float]:
        """The seconds that each phase took, the last one until now."""
        ends = [began for _, began in self._phases[1:]] + [time.monotonic()]
        taken = dict[str, float]()
        for (name, began), ended in zip(self._phases, ends, strict=False):
            taken[name] = taken.get(name, 0.0) + ended - began
        return taken

    def end(self, handle: Handle, error: DenoisedError | None = None) -> None:
        for channel in self.waiting.pop(handle, ()):
            # A copy: each reader adds its own traceback to what it raises.
            channel.end(copy.copy(error))


class Builds:
    """Brings pipelines to workers.

    Handles that want the same recipe at the same time share one build: the worker loads the first and makes the others
    from it. `place` says where, `built` records that a worker holds a handle's pipeline, and `dropped` hears of a
    handle that was being loaded and that nobody waits for any more, once the worker knows nothing of it.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        place: Callable[[Recipe], Awaitable[str]],
        built: Callable[[Handle, str, Loaded], None],
        dropped: Callable[[Handle], None],
        observer: Observer,
    ) -> None:
        self._executor = executor
        self._place = place
        self._built = built
        self._dropped = dropped
        self._observer = observer
        self._background = Background()
        # Those that may still be joined, and all.
        self._builds: dict[Hashable, _Build] = {}
        self._running: set[_Build] = set()

    async def follow(
        self,
        handle: Handle,
        origin: Origin | None = None,
        *,
        access: Access = NO_ACCESS,
        lasting: bool = False,
        linger: Callable[[], float] = lambda: 0.0,
    ) -> AsyncGenerator[LoadProgress, None]:
        """Ends when the handle's pipeline is live. Leaving early abandons its build, unless others wait for it too.

        Who is `lasting` needs the pipeline once more even though it is to be unloaded. Who leaves counts as waiting
        for as many seconds more as `linger` then says.
        """
        build = self._joinable(handle, origin, access) or self._begin(handle, origin, access)
        channel = Channel[LoadProgress]()
        build.waiting.setdefault(handle, {})[channel] = lasting
        if build.progress is not None:
            channel.put(build.progress)
        try:
            async for progress in channel:
                yield progress
        finally:
            if (seconds := linger()) and channel in build.waiting.get(handle, {}):
                build.lingering.add(channel)
                asyncio.get_running_loop().call_later(seconds, self._leave, build, handle, channel)
            else:
                self._leave(build, handle, channel)

    def recipes_on(self, worker: str) -> list[Recipe]:
        """What a worker will hold."""
        return [build.recipe for build in self._running if build.worker == worker]

    def involves(self, handle: Handle) -> bool:
        """Whether a worker may know the handle's pipeline before `built` or `dropped` has said so."""
        return any(handle in build.begun or handle in build.waiting for build in self._running)

    def abandon(self, handle: Handle, error: DenoisedError, *, everyone: bool) -> None:
        """Ends all waiting for a handle with an error, or all but what is lasting."""
        for build in self._running:
            for channel, lasting in tuple(build.waiting.get(handle, {}).items()):
                if everyone or not lasting:
                    channel.end(copy.copy(error))
                    if channel in build.lingering:
                        self._leave(build, handle, channel)

    async def stop(self) -> None:
        await self._background.stop()

    def _joinable(self, handle: Handle, origin: Origin | None, access: Access) -> _Build | None:
        # Two builds of one handle would be two pipelines of one name, of which the worker keeps neither.
        for build in self._running:
            if handle in build.waiting and build.is_wanted:
                return build
        # What is derived from a live pipeline takes milliseconds and its commands name that pipeline: not for others.
        return None if origin else self._builds.get((identity(handle.recipe), access))

    def _begin(self, handle: Handle, origin: Origin | None, access: Access) -> _Build:
        # What one token may download, another may not.
        key = handle if origin else (identity(handle.recipe), access)
        build = self._builds[key] = _Build(key, handle.recipe, origin, access)
        build.task = self._background.spawn(self._run(build), name=f"build of {handle.name}")
        self._running.add(build)
        build.task.add_done_callback(partial(self._ended, build))
        return build

    def _forget(self, build: _Build) -> None:
        """Whoever wants its recipe from now on has it built anew."""
        if self._builds.get(build.key) is build:
            del self._builds[build.key]

    def _leave(self, build: _Build, handle: Handle, channel: Channel[LoadProgress]) -> None:
        channels = build.waiting.get(handle, {})
        if channel not in channels:
            return  # The build has ended.
        del channels[channel]
        if channels:
            return
        if handle.state is State.LOADING:
            handle.state = State.UNLOADING
        if handle not in build.begun:
            del build.waiting[handle]
            self._drop(handle)
        if not build.is_wanted:
            self._forget(build)
            build.task.cancel()

    async def _run(self, build: _Build) -> None:
        outcome, began = "cancelled", time.monotonic()
        try:
            if not build.worker:
                # At once: who was told anything knows that the load goes on, and joins it when the connection is lost.
                build.report(LoadProgress(WAITING, "", 0, 0))
                build.worker = await self._place(build.recipe)
            await self._make(build)
            self._settle(build)
            outcome = "ok"
        except Exception as error:
            if not isinstance(error, DenoisedError):
                logger.exception("a build failed in a way it should not")
                error = InternalError("The daemon failed in a way it should not.", hint="Its log has the rest.")
            outcome = error.reason.lower()
            for handle in tuple(build.waiting):
                build.end(handle, error)
                if handle.state is State.LOADING:
                    handle.state = State.UNLOADING
                if handle not in build.begun:
                    self._drop(handle)
        finally:
            self._forget(build)
            self._observer.load_ended(build.recipe.spec.repo_id, outcome, time.monotonic() - began, build.phases())
            # What is left was begun and is not wanted: a cancelled load may have finished just before it heard of it.
            await self._clear(build)

    async def _make(self, build: _Build) -> None:
        """Has the worker build the recipe for the first handle, and twins of it for all that came since."""
        first = await self._next(build)
        assert first is not None, "a build that nobody waits for is cancelled"
        build.begun[first] = None
        begin: Command = Load(first.name, build.recipe, build.access, first.keep)
        if build.origin is not None:
            origin, settings = build.origin, build.recipe.settings
            begin = Derive(first.name, origin.pipeline, origin.derivation, settings, build.access, first.keep)
        async with aclosing(self._executor.submit(build.worker, begin)) as events:
            async for event in events:
                if isinstance(event, LoadProgress):
                    build.report(event)
                elif isinstance(event, Loaded):
                    build.begun[first] = event
        if build.begun[first] is None:
            raise InternalError(f"{build.worker} did not say what it loaded.")
        while (twin := await self._next(build)) is not None:
            build.begun[twin] = None
            command = Derive(twin.name, first.name, None, build.recipe.settings, keep=twin.keep)
            build.begun[twin] = await answer(self._executor, build.worker, command, Loaded)

    async def _next(self, build: _Build) -> Handle | None:
        """Who is to be built next. Returns only when no other build still clears that one's pipeline away."""
        while new := [handle for handle in build.waiting if handle not in build.begun]:
            clearing = [other.task for other in self._running if other is not build and new[0] in other.begun]
            if not clearing:
                return new[0]
            await asyncio.wait(clearing)
        return None

    def _settle(self, build: _Build) -> None:
        """Hands out what was built, except to handles that were abandoned."""
        for handle, loaded in tuple(build.begun.items()):
            # Generations that came before an unload still wait for their pipeline.
            is_wanted = handle.state is not State.UNLOADING or build.waiting.get(handle)
            if loaded is not None and is_wanted:
                self._built(handle, build.worker, loaded)
                del build.begun[handle]
                build.end(handle)

    async def _clear(self, build: _Build) -> None:
        """Makes sure that the worker does not keep what nobody wants."""
        for handle in tuple(build.begun):
            try:
                await answer(self._executor, build.worker, Unload(handle.name), Unloaded)
            except (PipelineNotFoundError, WorkerLostError):
                logger.debug("%s left nothing behind", handle.name)
            except DenoisedError as error:
                logger.error("%s may still hold %s: %s", build.worker, handle.name, error)
            del build.begun[handle]
            build.waiting.pop(handle, None)
            self._drop(handle)

    def _ended(self, build: _Build, task: asyncio.Task[None]) -> None:
        self._running.discard(build)

    def _drop(self, handle: Handle) -> None:
        if handle.state is State.UNLOADING:
            self._dropped(handle)

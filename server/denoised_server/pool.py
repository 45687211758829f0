"""The pool: every pipeline and every worker behind one daemon, and all that callers can ask of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from denoised.errors import PipelineUnloadedError, ShuttingDownError, WorkerLostError

from . import placement, recipes
from .background import Background
from .builds import Builds, Origin, answer
from .condition import Condition
from .executor import Executor
from .generations import GenerationEvent, Generations
from .handles import PREFIX, Handle, HandleTable, State
from .messages import (
    Derivation,
    Generate,
    Loaded,
    LoadProgress,
    Recipe,
    Spec,
    Unload,
    Unloaded,
)
from .observer import Observer
from .paging import page
from .supervision import Supervisor, WorkerRecord, WorkerState
from .updates import Change as SettingsChange
from .updates import Updates
from .views import PipelineView, WorkerView, view_all
from .watchers import Change, Watchers

logger = logging.getLogger(__name__)

EXPIRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Lease:
    """How a caller wants to hold a pipeline; mirrors the fields of LoadPipelineRequest."""

    ttl: float | None = None
    pipeline_id: str = ""
    request_id: str = ""


class Pool:
    """Owns the state of the front-end: handles, queues, builds and watchers.

    Everything here runs on one event loop, and the state changes only between two awaits.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        max_running: int = 32,
        max_waiting: int = 256,
        max_pixels: int = 16_777_216,
        default_ttl: float = 86_400,
        max_ttl: float = 2_592_000,
        start_timeout: float = 120,
        observer: Observer | None = None,
    ) -> None:
        self._executor = executor
        self._start_timeout = start_timeout
        self._observer = observer or Observer()
        self._handles = HandleTable(default_ttl=default_ttl, max_ttl=max_ttl)
        self._supervisor = Supervisor(executor, lost=self._handles.lose, changed=self._changed, observer=self._observer)
        self._builds = Builds(
            executor, place=self._place, built=self._activate, dropped=self._drop, observer=self._observer
        )
        self._generations = Generations(
            executor,
            bring_back=self._bring_back,
            missing=self._miss,
            changed=self._changed,
            observer=self._observer,
            max_running=max_running,
            max_waiting=max_waiting,
            max_pixels=max_pixels,
        )
        self._updates = Updates(executor, bring_back=self._bring_back, missing=self._miss, updated=self._update_handle)
        self._unloads: dict[Handle, asyncio.Task[int]] = {}
        self._watchers = Watchers()
        self._changes = Condition()
        self._views: Mapping[str, PipelineView] | None = None
        self._background = Background()
        self._is_publishing = False
        self._is_draining = False

    # Life

    async def start(self) -> None:
        """Returns when every worker is ready. Raises what the executor raised."""
        await self._supervisor.start()
        self._background.spawn(self._expire_for_ever(), name="expiry")

    @property
    def is_serving(self) -> bool:
        """Whether new work has a chance."""
        return not self._is_draining and self._supervisor.has_active

    async def until(self, predicate: Callable[[], bool]) -> None:
        """Returns once the predicate, which looks at this pool, is true."""
        await self._changes.until(predicate)

    async def drain(self, grace: float) -> None:
        """Takes no new work, ends what has not begun, and waits so many seconds for the rest."""
        self._is_draining = True
        self._supervisor.drain()
        for handle in self._handles:
            self._builds.abandon(handle, _shutting_down(), everyone=True)
        self._generations.interrupt(_shutting_down(), lambda handle, admitted: not admitted)
        try:
            async with asyncio.timeout(grace):
                await self._changes.until(lambda: not self._generations)
        except TimeoutError:
            logger.warning("the grace of %g s is over; what still runs is ended", grace)
            self._generations.interrupt(_shutting_down(), lambda handle, admitted: True)
        self._watchers.end(_shutting_down())

    async def stop(self) -> None:
        """Stops the workers and everything that waits for them."""
        self._is_draining = True
        self._generations.interrupt(_shutting_down(), lambda handle, admitted: True)
        self._watchers.end(_shutting_down())
        await self._builds.stop()
        await self._background.stop()
        await self._supervisor.stop()

    # Pipelines

    async def load(self, spec: Spec, lease: Lease) -> AsyncGenerator[LoadProgress | PipelineView, None]:
        """Yields the progress, then the pipeline. Closing it early abandons the load unless others wait for it."""
        await self._wait_for_id(lease)
        handle = self._open(Recipe(spec), lease)
        if not handle.worker:
            async with aclosing(self._builds.follow(handle)) as progress:
                async for event in progress:
                    yield event
        yield self.get(handle.name)

    async def derive(self, source: str, derivation: Derivation, lease: Lease) -> PipelineView:
        while True:
            await self._wait_for_id(lease)
            origin = self._handles.use(source, now=time.time(), field="source")
            with self._pinned(origin):
                await self._bring_back(origin)
                # Never waits for an id with a pin in hand: its pipeline's removal may in turn wait for that pin.
                if not self._is_leaving(lease):
                    handle = await self._derive(origin, derivation, lease)
                    return self.get(handle.name)

    async def _derive(self, origin: Handle, derivation: Derivation, lease: Lease) -> Handle:
        handle = self._open(recipes.derive(origin.recipe, derivation), lease, source=origin.name)
        if not handle.worker:
            await self._finish(self._builds.follow(handle, Origin(origin.worker, origin.name, derivation)))
        return handle

    async def update(self, name: str, change: SettingsChange) -> PipelineView:
        """Changes settings of a pipeline, for generations that come after."""
        self._check_open()
        handle = self._handles.use(name, now=time.time())
        # Shielded: a caller who leaves does not leave the worker and the recipe to disagree.
        await asyncio.shield(self._background.spawn(self._update(handle, change), name=f"update of {handle.name}"))
        return self.get(handle.name)

    async def _update(self, handle: Handle, change: SettingsChange) -> None:
        with self._pinned(handle):
            await self._updates.update(handle, change)

    def get(self, name: str) -> PipelineView:
        return self._view_all()[self._handles.get(name).name]

    def list_pipelines(self, *, page_size: int, page_token: str) -> tuple[list[PipelineView], str]:
        """One page, oldest first, and the token of the next one."""
        handles, token = self._handles.page(size=page_size, token=page_token)
        views = self._view_all()
        return [views[handle.name] for handle in handles], token

    async def watch(self) -> AsyncGenerator[Change, None]:
        """Yields every pipeline, a SYNCED, then each change. Raises WatchLaggedError when the reader is too slow."""
        self._check_open()
        changes = self._watchers.subscribe(self._view_all())
        try:
            async for change in changes:
                yield change
        finally:
            self._watchers.unsubscribe(changes)

    def renew(self, name: str, ttl: float | None) -> PipelineView:
        handle = self._handles.renew(name, now=time.time(), ttl=ttl)
        self._changed()
        return self.get(handle.name)

    async def unload(self, name: str, *, force: bool = False) -> int:
        """Lets go of a pipeline when nothing uses it any more; with force, ends what does. Returns the bytes freed."""
        if self._handles.is_gone(name):
            return 0
        handle = self._handles.get(name)
        if force:
            self._generations.interrupt(_unloaded(handle), lambda held, admitted: held is handle)
            self._builds.abandon(handle, _unloaded(handle), everyone=True)
        # Shielded: a caller who leaves does not leave the pipeline between two states.
        return await asyncio.shield(self._unload_soon(handle))

    def expire(self, now: float) -> None:
        """Unloads what nobody has used for as long as its lease says."""
        for handle in self._handles.expired(now):
            logger.info("%s has expired", handle.name)
            self._unload_soon(handle)

    # Generations

    async def generate(self, command: Generate) -> AsyncGenerator[GenerationEvent, None]:
        """Runs a pipeline. Closing the generator ends the run at its next step."""
        self._check_open()
        handle = self._handles.use(command.pipeline, now=time.time(), field="pipeline")
        async with aclosing(self._generations.generate(handle, command)) as events:
            async for event in events:
                yield event

    # Workers

    def list_workers(self, *, page_size: int, page_token: str) -> tuple[list[WorkerView], str]:
        """One page in a stable order, and the token of the next one."""
        order = {name: number for number, name in enumerate(self._supervisor.workers)}
        records = list(self._supervisor.workers.values())
        chosen, token = page(records, key=lambda record: order[record.name], size=page_size, token=page_token)
        return [self._view_worker(record) for record in chosen], token

    def _view_worker(self, record: WorkerRecord) -> WorkerView:
        gate = self._generations.gate(record.name)
        return WorkerView(
            name=record.name,
            state=record.state,
            ready=record.ready,
            snapshot=record.snapshot,
            running_count=gate.running_count,
            waiting_count=gate.waiting_count,
            restart_count=record.restart_count,
            pipeline_count=sum(handle.worker == record.name for handle in self._handles),
        )

    # Steps of the above

    def _check_open(self) -> None:
        if self._is_draining:
            raise _shutting_down()

    def _is_leaving(self, lease: Lease) -> bool:
        return self._handles.is_leaving(PREFIX + lease.pipeline_id, lease.request_id, time.time())

    async def _wait_for_id(self, lease: Lease) -> None:
        """The ids of a pipeline that is on its way out, its own and its request's, are free when it is gone."""
        self._check_open()
        await self._changes.until(lambda: not self._is_leaving(lease))

    def _open(self, recipe: Recipe, lease: Lease, *, source: str = "") -> Handle:
        self._check_open()
        handle = self._handles.open(
            recipe,
            now=time.time(),
            ttl=lease.ttl,
            pipeline_id=lease.pipeline_id,
            request_id=lease.request_id,
            source=source,
        )
        self._changed()
        return handle

    async def _bring_back(self, handle: Handle) -> None:
        """Returns with the handle's pipeline live: waits for its load, or has a worker build it again."""
        while not handle.worker:
            await self._finish(self._builds.follow(handle, lasting=True))

    async def _finish(self, build: AsyncGenerator[LoadProgress, None]) -> None:
        async with aclosing(build) as progress:
            async for _ in progress:
                pass

    async def _place(self, recipe: Recipe) -> str:
        await self._supervisor.wait_for_active(self._start_timeout)
        candidates = [
            placement.Candidate(
                record.name,
                takes_work=record.state is WorkerState.ACTIVE,
                free_bytes=record.free_bytes,
                recipes=(
                    *(handle.recipe for handle in self._handles if handle.worker == record.name),
                    *self._builds.recipes_on(record.name),
                ),
            )
            for record in self._supervisor.workers.values()
        ]
        return placement.choose(recipe, candidates)

    def _activate(self, handle: Handle, worker: str, loaded: Loaded) -> None:
        self._handles.activate(handle, worker=worker, loaded=loaded, now=time.time())
        logger.info("%s is live on %s: %s", handle.name, worker, loaded.pipeline_class)
        self._changed()

    def _update_handle(self, handle: Handle, loaded: Loaded) -> None:
        self._handles.update(handle, loaded)
        self._changed()

    def _miss(self, handle: Handle) -> None:
        handle.worker = ""
        self._changed()

    def _drop(self, handle: Handle) -> None:
        # What is being unloaded may be built once more for a generation that still waits: its unload removes it.
        if handle not in self._unloads:
            self._handles.remove(handle)
        self._changed()

    def _remove(self, handle: Handle) -> None:
        self._handles.remove(handle)
        self._changed()

    @contextmanager
    def _pinned(self, handle: Handle) -> Iterator[None]:
        handle.pins += 1
        try:
            yield
        finally:
            handle.pins -= 1
            self._changed()

    def _unload_soon(self, handle: Handle) -> asyncio.Task[int]:
        task = self._unloads.get(handle)
        if task is None:
            task = self._unloads[handle] = self._background.spawn(self._unload(handle), name=f"unload of {handle.name}")
            task.add_done_callback(lambda _: self._unloads.pop(handle))
        return task

    async def _unload(self, handle: Handle) -> int:
        if handle.state is State.LOADING:
            self._builds.abandon(handle, _unloaded(handle), everyone=False)
        handle.state = State.UNLOADING
        self._changed()
        await self._changes.until(lambda: handle.pins == 0 and not self._builds.involves(handle))
        freed = 0
        if handle in self._handles:
            try:
                if handle.worker:
                    freed = (await answer(self._executor, handle.worker, Unload(handle.name), Unloaded)).freed_bytes
            except WorkerLostError:
                logger.debug("%s went with its worker", handle.name)
            finally:
                self._remove(handle)
        logger.info("%s is unloaded; %d bytes were freed", handle.name, freed)
        return freed

    async def _expire_for_ever(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_SECONDS)
            self.expire(time.time())

    def _view_all(self) -> Mapping[str, PipelineView]:
        if self._views is None:
            snapshots = {record.name: record.snapshot for record in self._supervisor.workers.values()}
            self._views = view_all(self._handles, snapshots, self._generations.counts())
        return self._views

    def _changed(self) -> None:
        self._views = None
        self._changes.notify()
        if not self._is_publishing:
            # Once for all changes of this turn of the loop.
            self._is_publishing = True
            asyncio.get_running_loop().call_soon(self._publish)

    def _publish(self) -> None:
        self._is_publishing = False
        self._observer.pipelines_changed(Counter(handle.state for handle in self._handles))
        if self._watchers:
            self._watchers.publish(self._view_all())


def _shutting_down() -> ShuttingDownError:
    return ShuttingDownError("The daemon is shutting down.", hint="Send the request to another one, or later.")


def _unloaded(handle: Handle) -> PipelineUnloadedError:
    return PipelineUnloadedError(
        f"{handle.name} was unloaded.", hint="Load it again.", metadata={"pipeline": handle.name}
    )

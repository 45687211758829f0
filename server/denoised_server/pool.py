"""The pool: every pipeline and every worker behind one daemon, and all that callers can ask of them."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace

from denoised.errors import (
    DenoisedError,
    JournalUnavailableError,
    NoRoomError,
    PipelineExistsError,
    PipelineNotFoundError,
    PipelineUnloadedError,
    QuotaExceededError,
    ShuttingDownError,
    WorkerLostError,
    WorkerNotFoundError,
    WorkersDrainedError,
)

from . import callers, placement, preloads, quotas, recipes, references
from .background import Background
from .builds import Builds, Origin, answer
from .condition import Condition
from .detached import Detached
from .drains import Drains
from .eventlog import Numbered
from .executor import Executor
from .generation import GenerationEvent, GenerationView, Terms
from .generations import Generations
from .handles import PREFIX, Handle, HandleTable, State
from .journal import Journal
from .messages import (
    Access,
    Derivation,
    Generate,
    Hold,
    Loaded,
    LoadProgress,
    Plan,
    Planned,
    Recipe,
    Reply,
    Spec,
    Unload,
    Unloaded,
)
from .observer import Observer
from .paging import page
from .preloads import Preload
from .probes import Report, judge
from .readiness import Readiness
from .recycling import Recycling
from .retention import Retention
from .supervision import Supervisor, WorkerRecord, WorkerState
from .updates import Change as SettingsChange
from .updates import Updates
from .views import Census, PipelineView, PlanView, WorkerView, owned_bytes
from .watchers import Change, Watchers

logger = logging.getLogger(__name__)

DEFAULT_TERMS = Terms()
EXPIRY_SECONDS = 1.0
ACCESS = Access()
# How long a load with a request_id goes on without its caller, who may only have lost the connection.
REJOIN_SECONDS = 10.0
# A caller and the daemon do not see a deadline pass at the same time.
LAST_MOMENT_SECONDS = 1.0
# Between two tries to bring a pinned pipeline back.
KEEP_LIVE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Lease:
    """How a caller wants to hold a pipeline; mirrors the fields of LoadPipelineRequest."""

    ttl: float | None = None
    pipeline_id: str = ""
    request_id: str = ""
    pinned: bool = False
    shared: bool = False
    keep_alive: float | None = None


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
        callback_timeout: float = 600.0,
        default_ttl: float = 86_400,
        max_ttl: float = 2_592_000,
        start_timeout: float = 120,
        heartbeat_timeout: float = 30,
        step_timeout: float = 900,
        leak_limit: int | float = 0,
        publish_interval: float = 0.1,
        journal: Journal | None = None,
        results_ttl: float = 86_400,
        results_bytes: int = 2**30,
        keep_requests: bool = True,
        preload: Sequence[Preload] = (),
        trials: bool = False,
        observer: Observer | None = None,
    ) -> None:
        self._executor = executor
        self._start_timeout = start_timeout
        self._observer = observer or Observer()
        self._journal = journal or Journal()
        self._handles = HandleTable(default_ttl=default_ttl, max_ttl=max_ttl)
        self._supervisor = Supervisor(
            executor,
            lost=self._lose,
            changed=self._changed,
            observer=self._observer,
            heartbeat_timeout=heartbeat_timeout,
            step_timeout=step_timeout,
        )
        self._builds = Builds(
            executor, place=self._place, built=self._activate, dropped=self._drop, observer=self._observer
        )
        retention = Retention(ttl=results_ttl, max_bytes=results_bytes)
        self._detached = Detached(self._journal, retention, keeps_requests=keep_requests)
        self._generations = Generations(
            executor,
            bring_back=self._bring_back,
            check_drained=self._supervisor.check_drained,
            resumed=self._resumed,
            missing=self._miss,
            changed=self._changed,
            ready=lambda worker: self._supervisor.workers[worker].ready,
            observer=self._observer,
            max_running=max_running,
            max_waiting=max_waiting,
            max_pixels=max_pixels,
            callback_timeout=callback_timeout,
            detached=self._detached,
        )
        self._updates = Updates(
            executor,
            bring_back=self._bring_back,
            is_building=self._builds.involves,
            missing=self._miss,
            updated=self._update_handle,
        )
        self._recycling = Recycling(leak_limit)
        self._readiness = Readiness(
            preload,
            load=self._preload,
            is_live=self._is_live,
            generate=self._try if trials else None,
            is_busy=lambda name: self._generations.gate(self._handles.get(name).worker).running_count > 0,
            changed=self._changed,
        )
        self._changes = Condition()
        self._drains = Drains(
            executor,
            handles=self._handles,
            is_busy=self._is_busy,
            is_building=self._builds.involves,
            moved=self._leave_worker,
            changes=self._changes,
        )
        self._unloads: dict[Handle, asyncio.Task[int]] = {}
        self._keeping: dict[Handle, asyncio.Task[JournalUnavailableError | None]] = {}
        self._returning: set[Handle] = set()
        self._watchers = Watchers()
        self._census: Census | None = None
        self._background = Background()
        self._publish_interval, self._published = publish_interval, -math.inf
        self._is_publishing = False
        self._is_draining = False
        self._is_restored = self._is_started = False

    # Life

    async def restore(self) -> None:
        """Brings back what the journal kept; from then on callers may come, and wait for workers."""
        self._is_restored = True
        self._handles.restore(await self._journal.pipelines(), await self._journal.unloaded(), time.time())
        for handle in self._handles:
            if handle.preloaded and handle.name not in self._readiness.names:
                handle.preloaded = handle.pinned = False
                await self._rewrite(handle)
        await self._generations.restore(self._find)

    async def start(self) -> None:
        """Returns when every worker is up. Raises what the executor raised."""
        if not self._is_restored:
            await self.restore()
        await self._supervisor.start()
        self._is_started = True
        self._background.spawn(self._expire_for_ever(), name="expiry")
        self._keep_pinned_live()

    async def get_ready(self) -> None:
        """Returns when every declared pipeline is usable. Raises what is wrong with one that will never be."""
        await self._readiness.bring_up()

    def health(self) -> Report:
        """How the daemon is, and why."""
        return judge(
            is_started=self.has_started,
            is_draining=self._is_draining,
            workers={name: record.state for name, record in self._supervisor.workers.items()},
            preloads=self._readiness.standings(),
        )

    @property
    def has_started(self) -> bool:
        """Whether it was ready at some time."""
        return self._is_started and self._readiness.has_been_ready

    @property
    def is_serving(self) -> bool:
        """Whether new work has a chance."""
        return self.health().is_serving

    async def until(self, predicate: Callable[[], bool]) -> None:
        """Returns once the predicate, which looks at this pool, is true."""
        await self._changes.until(predicate)

    async def drain(self, grace: float) -> None:
        """Takes no new work, ends what has not begun, and waits so many seconds for the rest."""
        self._is_draining = True
        await self._readiness.stop()
        self._supervisor.drain()
        for handle in self._handles:
            self._builds.abandon(handle, _shutting_down(), everyone=True)
        self._generations.leave_for_later(_shutting_down(), lambda generation: not generation.worker)
        try:
            async with asyncio.timeout(grace):
                await self._changes.until(lambda: not self._generations)
        except TimeoutError:
            logger.warning("the grace of %g s is over; what still runs is ended", grace)
            self._generations.leave_for_later(_shutting_down(), lambda generation: True)
        self._watchers.end(_shutting_down())

    async def stop(self) -> None:
        """Stops the workers and everything that waits for them."""
        self._is_draining = True
        self._generations.leave_for_later(_shutting_down(), lambda generation: True)
        self._watchers.end(_shutting_down())
        await self._readiness.stop()
        await self._drains.stop()
        await self._builds.stop()
        await self._generations.stop()
        await self._background.stop()
        await self._supervisor.stop()
        await self._note_uses()
        await self._journal.close()

    # Pipelines

    async def load(
        self, spec: Spec, lease: Lease, access: Access = ACCESS, *, left: float | None = None
    ) -> AsyncGenerator[LoadProgress | PipelineView, None]:
        """Yields the progress, then the pipeline, once the journal has it.

        Closing it early abandons the load, unless others wait for it or its request_id is sent again soon, which nobody
        does whose time is over, in `left` seconds.
        """
        deadline = math.inf if left is None else time.monotonic() + left - LAST_MOMENT_SECONDS
        spec = references.resolve(spec, self._reference, "spec")
        await self._wait_for_id(lease)
        handle = self._open(Recipe(spec), lease)

        def linger() -> float:
            return REJOIN_SECONDS if handle.request_id and time.monotonic() < deadline else 0.0

        with self._claimed(handle, linger):
            if not handle.worker:
                async with aclosing(self._builds.follow(handle, access=access, linger=linger)) as progress:
                    async for event in progress:
                        yield event
            self._check_quota(handle)
            await self._keep(handle)
        yield self.get(handle.name)

    async def plan(self, spec: Spec, access: Access = ACCESS) -> PlanView:
        """What loading it now would take. Nothing is loaded, and nothing promised."""
        self._check_open()
        recipe = Recipe(references.resolve(spec, self._reference, "spec"))
        worker = await self._place(recipe)
        planned = await answer(self._executor, worker, Plan(recipe, access), Planned)
        seen = frozenset(handle.name for handle in self._handles if handle.is_seen_by(callers.current()))
        return PlanView(worker, planned, seen)

    async def derive(self, source: str, derivation: Derivation, lease: Lease, access: Access = ACCESS) -> PipelineView:
        derivation = references.resolve(derivation, self._reference, "derivation")
        while True:
            await self._wait_for_id(lease)
            origin = self._handles.use(source, now=time.time(), field="source", caller=callers.current())
            with self._pinned(origin):
                await self._bring_back(origin)
                # Never waits for an id with a pin in hand: its pipeline's removal may in turn wait for that pin.
                if not self._is_leaving(lease):
                    handle = await self._derive(origin, derivation, lease, access)
                    return self.get(handle.name)

    async def _derive(self, origin: Handle, derivation: Derivation, lease: Lease, access: Access) -> Handle:
        handle = self._open(recipes.derive(origin.recipe, derivation), lease, source=origin.name)
        with self._claimed(handle, lambda: 0.0):
            if not handle.worker:
                built = Origin(origin.worker, origin.name, derivation)
                await self._finish(self._builds.follow(handle, built, access=access))
            self._check_quota(handle)

            await self._keep(handle)
        return handle

    def _check_quota(self, handle: Handle) -> None:
        """How much of its weights is its client's alone is known when it is loaded; one too many is let go of again."""
        caller = callers.current()
        try:
            quotas.check_exclusive_bytes(caller, owned_bytes(self._handles, caller.name))
        except QuotaExceededError:
            self._unload_soon(handle)
            raise

    async def update(self, name: str, change: SettingsChange) -> PipelineView:
        """Changes settings of a pipeline, for generations that come after."""
        self._check_open()
        handle = self._handles.use(self._own(name).name, now=time.time())
        # Shielded: a caller who leaves does not leave the worker and the recipe to disagree.
        await asyncio.shield(self._background.spawn(self._update(handle, change), name=f"update of {handle.name}"))
        return self.get(handle.name)

    async def _update(self, handle: Handle, change: SettingsChange) -> None:
        with self._pinned(handle):
            await self._updates.update(handle, change)
            await self._rewrite(handle)

    def get(self, name: str) -> PipelineView:
        return self._view_all()[self._handles.get(name, caller=callers.current()).name]

    def list_pipelines(self, *, page_size: int, page_token: str) -> tuple[list[PipelineView], str]:
        """One page, oldest first, and the token of the next one."""
        handles, token = self._handles.page(size=page_size, token=page_token, caller=callers.current())
        views = self._view_all()
        return [views[handle.name] for handle in handles], token

    async def watch(self) -> AsyncGenerator[Change, None]:
        """Yields every pipeline, a SYNCED, then each change. Raises WatchLaggedError when the reader is too slow."""
        self._check_open()
        changes = self._watchers.subscribe(self._view_all(), callers.current())
        try:
            async for change in changes:
                yield change
        finally:
            self._watchers.unsubscribe(changes)

    async def renew(
        self, name: str, ttl: float | None, pinned: bool | None = None, keep_alive: float | None = None
    ) -> PipelineView:
        before = self._handles.own(name, caller=callers.current()).keep
        handle = self._handles.renew(
            name, now=time.time(), ttl=ttl, pinned=pinned, keep_alive=keep_alive, caller=callers.current()
        )
        self._changed()
        if handle.keep != before and handle.worker:
            try:
                await self._tell_keep(handle)
            except NoRoomError:
                handle.pinned, handle.keep_alive = before.pinned, before.keep_alive
                raise
        await self._rewrite(handle)
        self._keep_pinned_live()
        return self.get(handle.name)

    async def unload(self, name: str, *, force: bool = False) -> int:
        """Lets go of a pipeline when nothing uses it any more; with force, ends what does. Returns the bytes freed."""
        if self._handles.is_gone(name, caller=callers.current()):
            return 0
        handle = self._own(name)
        if force:
            self._generations.interrupt(_unloaded(handle), lambda generation: generation.handle is handle)
            self._builds.abandon(handle, _unloaded(handle), everyone=True)
        # Shielded: a caller who leaves does not leave the pipeline between two states.
        return await asyncio.shield(self._unload_soon(handle))

    def expire(self, now: float) -> None:
        """Unloads what nobody has used for as long as its lease says."""
        for handle in self._handles.expired(now):
            logger.info("%s has expired", handle.name)
            self._observer.pipeline_expired()
            self._unload_soon(handle)

    def recycle(self, now: float) -> None:
        """Starts workers anew that hold memory which is in no book, while nobody waits for them. Handles stay."""
        if any(
            record.state in (WorkerState.LOST, WorkerState.STARTING) for record in self._supervisor.workers.values()
        ):
            # One at a time: the others take what comes meanwhile.
            return
        for name, record in self._supervisor.workers.items():
            is_idle = record.state is WorkerState.ACTIVE and not self._is_busy(name) and not self._is_asked(name)
            if self._recycling.is_due(name, record.snapshot, is_idle=is_idle, now=now):
                self._supervisor.recycle(name)
                return

    def _is_asked(self, worker: str) -> bool:
        """Whether a generation waits for its turn there, or somebody has a hand on one of its pipelines."""
        is_used = any(handle.worker == worker and handle.pins for handle in self._handles)
        return is_used or self._generations.gate(worker).waiting_count > 0

    # Generations

    async def generate(
        self, command: Generate, terms: Terms = DEFAULT_TERMS, replies: AsyncIterator[Reply] | None = None
    ) -> AsyncGenerator[Numbered[GenerationEvent], None]:
        """Runs a pipeline. Closing the generator ends the run at its next step, unless it is read elsewhere.

        Each StepEnd takes a reply.
        """
        self._check_open()
        caller = callers.current()
        handle = self._handles.use(command.pipeline, now=time.time(), field="pipeline", caller=caller)
        command = replace(command, client=caller.name)
        terms = replace(terms, owner=caller.name)
        async with aclosing(self._generations.generate(handle, command, terms, replies)) as events:
            async for event in events:
                yield event

    async def resume_generation(self, name: str, after: int) -> AsyncGenerator[Numbered[GenerationEvent], None]:
        """The events of a generation after one of them, as its first caller would have got them."""
        async with aclosing(self._generations.resume(name, after, callers.current())) as events:
            async for event in events:
                yield event

    def get_generation(self, name: str) -> GenerationView:
        return self._generations.get(name, callers.current())

    def list_generations(self, *, page_size: int, page_token: str) -> tuple[list[GenerationView], str]:
        """One page, oldest first, and the token of the next one."""
        return self._generations.page(size=page_size, token=page_token, caller=callers.current())

    def cancel_generation(self, name: str) -> GenerationView:
        """Ends it at its next step; one that is over stays as it is."""
        return self._generations.cancel(name, callers.current())

    # Workers

    def list_workers(self, *, page_size: int, page_token: str) -> tuple[list[WorkerView], str]:
        """One page in a stable order, and the token of the next one."""
        order = {name: number for number, name in enumerate(self._supervisor.workers)}
        records = list(self._supervisor.workers.values())
        chosen, token = page(records, key=lambda record: order[record.name], size=page_size, token=page_token)
        return [self._view_worker(record) for record in chosen], token

    async def drain_worker(self, name: str) -> WorkerView:
        """Makes a worker take no more work; returns when it has nothing left to do. Leaving early changes nothing."""
        record = self._find_worker(name)
        self._supervisor.drain_worker(name)
        await self._drains.drain(name)
        return self._view_worker(record)

    def resume_worker(self, name: str) -> WorkerView:
        """Makes a worker that was drained take work again."""
        record = self._find_worker(name)
        self._drains.end(name)
        self._supervisor.resume_worker(name)
        self._keep_pinned_live()
        return self._view_worker(record)

    def _find_worker(self, name: str) -> WorkerRecord:
        if name not in self._supervisor.workers:
            raise WorkerNotFoundError(f"There is no worker {name[:80]!r}.", hint="ListWorkers names those there are.")
        return self._supervisor.workers[name]

    async def watch_workers(self, interval: float) -> AsyncGenerator[WorkerView, None]:
        """Yields each worker, and then each that has changed, no oftener than every so many seconds."""
        self._check_open()
        told = dict[str, WorkerView]()
        while True:
            for record in list(self._supervisor.workers.values()):
                if told.get(record.name) != (view := self._view_worker(record)):
                    told[record.name] = view
                    yield view
            await asyncio.sleep(interval)
            await self._changes.until(lambda: self._is_draining or self._has_changed(told))
            if self._is_draining:
                raise _shutting_down()

    def _has_changed(self, told: Mapping[str, WorkerView]) -> bool:
        return any(told.get(record.name) != self._view_worker(record) for record in self._supervisor.workers.values())

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

    def _reference(self, pipeline: str) -> references.Origin:
        handle = self._handles.use(pipeline, now=time.time(), field="pipeline", caller=callers.current())
        roles = tuple(part.role for part in handle.loaded.components) if handle.loaded else ()
        return references.Origin(handle.recipe, roles)

    def _find(self, name: str) -> Handle:
        return self._handles.use(name, now=time.time(), field="pipeline", caller=callers.DAEMON)

    def _check_open(self) -> None:
        if self._is_draining:
            raise _shutting_down()

    def _is_leaving(self, lease: Lease) -> bool:
        return self._handles.is_leaving(
            PREFIX + lease.pipeline_id, lease.request_id, time.time(), caller=callers.current()
        )

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
            pinned=lease.pinned,
            keep_alive=lease.keep_alive,
            shared=lease.shared,
            caller=callers.current(),
        )
        self._changed()
        return handle

    def _own(self, name: str) -> Handle:
        return self._handles.own(name, caller=callers.current())

    async def _bring_back(self, handle: Handle) -> None:
        """Returns with the handle's pipeline live: waits for its load, or has a worker build it again."""
        while not handle.worker:
            if handle not in self._handles:
                # Its first load failed; a replay must not load what nobody holds.
                raise PipelineNotFoundError(
                    f"{handle.name} could not be loaded.", hint="Load it again.", metadata={"pipeline": handle.name}
                )
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

    async def _keep(self, handle: Handle) -> None:
        """Returns when the journal has the handle. One that it cannot have is let go of again."""
        if handle.is_kept:
            return
        # One for all callers, and to its end whoever leaves: until then nobody knows what the journal has.
        task = self._keeping.get(handle)
        if task is None:
            task = self._keeping[handle] = self._background.spawn(self._write(handle), name=f"entry of {handle.name}")
            task.add_done_callback(lambda _: self._kept(handle))
        if (error := await asyncio.shield(task)) is not None:
            raise error

    def _kept(self, handle: Handle) -> None:
        del self._keeping[handle]
        # An unload may wait for this.
        self._changed()

    async def _rewrite(self, handle: Handle) -> None:
        """Returns when the journal has what changed. One that is being loaded gets there as it will be."""
        if (writing := self._keeping.get(handle)) is not None:
            await asyncio.shield(writing)
        if handle.is_kept:
            await self._journal.keep_pipeline(handle.name, handle.kept())

    async def _write(self, handle: Handle) -> JournalUnavailableError | None:
        noted = handle.last_use_time
        try:
            await self._journal.keep_pipeline(handle.name, handle.kept())
        except JournalUnavailableError as error:
            if handle in self._handles:
                self._unload_soon(handle)
            return error
        handle.is_kept, handle.noted_use_time = True, noted
        return None

    @contextmanager
    def _claimed(self, handle: Handle, linger: Callable[[], float]) -> Iterator[None]:
        """A handle that none of its callers waited for is nobody's, and goes; after as many seconds as is then said."""
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            asyncio.get_running_loop().call_later(linger(), self._drop_unclaimed, handle)
            raise
        handle.is_claimed = True

    def _drop_unclaimed(self, handle: Handle) -> None:
        if handle in self._handles and handle.state is State.ACTIVE and not (handle.is_claimed or self._is_draining):
            self._unload_soon(handle)

    def _keep_pinned_live(self) -> None:
        for handle in self._handles:
            if self._is_to_return(handle) and handle not in self._returning:
                self._returning.add(handle)
                self._background.spawn(self._keep_live(handle), name=f"return of {handle.name}")

    def _is_to_return(self, handle: Handle) -> bool:
        is_held = handle in self._handles and handle.state is State.ACTIVE
        return is_held and handle.pinned and not (handle.worker or self._is_draining)

    async def _keep_live(self, handle: Handle) -> None:
        try:
            while self._is_to_return(handle):
                try:
                    with self._pinned(handle):
                        await self._bring_back(handle)
                except WorkersDrainedError:
                    await self._resumed()
                except DenoisedError as error:
                    logger.error("%s is pinned and could not be brought back: %s", handle.name, error)
                    await asyncio.sleep(KEEP_LIVE_SECONDS)
        finally:
            self._returning.remove(handle)

    async def _resumed(self) -> None:
        """Returns when a worker takes work."""
        await self._changes.until(lambda: self._supervisor.has_active)

    async def _preload(self, preload: Preload) -> None:
        """Returns when a declared pipeline is live and kept; another one of its name goes."""
        lease = Lease(pipeline_id=preload.name.removeprefix(PREFIX), pinned=True, shared=True)
        await self._resumed()
        while True:
            try:
                if not (handle := await self._hold(preload.spec, lease)).owner:
                    break
                # A client's own is not for others to see, nor for the client to take from them.
            except PipelineExistsError:
                handle = self._handles.get(preload.name)
            logger.warning("%s is not what the configuration says, and is replaced", preload.name)
            await self._unload_soon(handle)
        handle.pinned = handle.shared = handle.preloaded = True
        await self._rewrite(handle)

    async def _hold(self, spec: Spec, lease: Lease) -> Handle:
        async with aclosing(self.load(spec, lease)) as events:
            async for _ in events:
                pass
        return self._handles.get(PREFIX + lease.pipeline_id)

    def _is_live(self, name: str) -> bool:
        handle = self._handles.find(name)
        return handle is not None and handle.preloaded and bool(handle.worker) and handle.state is State.ACTIVE

    async def _try(self, name: str) -> None:
        loaded = self._handles.get(name).loaded
        command = preloads.trial(name, loaded.parameters if loaded else ())
        async with aclosing(self.generate(command)) as events:
            async for _ in events:
                pass

    def _is_busy(self, worker: str, handle: Handle | None = None) -> bool:
        """Whether a worker has something to finish, or something of one pipeline's."""
        is_building = handle is None and bool(self._builds.recipes_on(worker))
        return is_building or self._generations.runs_on(worker, handle) or self._updates.runs_on(worker, handle)

    def _leave_worker(self, worker: str) -> None:
        self._generations.gate(worker).dismiss()
        self._keep_pinned_live()
        self._changed()

    def _lose(self, worker: str) -> None:
        self._generations.lose(worker, is_busy=bool(self._builds.recipes_on(worker)))
        self._drains.lose(worker)
        self._handles.lose(worker)
        self._keep_pinned_live()

    async def _tell_keep(self, handle: Handle) -> None:
        """Returns when the handle's worker keeps its components as the handle says; the next one is told anyway."""
        try:
            async with aclosing(self._executor.submit(handle.worker, Hold(handle.name, handle.keep))) as events:
                async for _ in events:
                    pass
        except (WorkerLostError, PipelineNotFoundError):
            logger.debug("%s is not live any more", handle.name)

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
        await self._changes.until(lambda: self._is_free(handle))
        freed = 0
        if handle in self._handles:
            if handle.is_kept:
                await self._forget(handle)
            try:
                for worker in filter(None, (handle.worker, self._drains.claim(handle))):
                    try:
                        freed += (await answer(self._executor, worker, Unload(handle.name), Unloaded)).freed_bytes
                    except WorkerLostError:
                        logger.debug("%s went with its worker", handle.name)
            finally:
                self._remove(handle)
        logger.info("%s is unloaded; %d bytes were freed", handle.name, freed)
        return freed

    def _is_free(self, handle: Handle) -> bool:
        return not (handle.pins or self._builds.involves(handle) or handle in self._keeping)

    async def _forget(self, handle: Handle) -> None:
        """Before the worker lets go: what could not be forgotten would be back after a restart."""
        try:
            await self._journal.forget_pipeline(handle.name)
        except JournalUnavailableError:
            handle.state = State.ACTIVE
            self._changed()
            raise

    async def _expire_for_ever(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_SECONDS)
            self.expire(time.time())
            self.recycle(time.monotonic())
            await self._note_uses()
            await self._detached.tidy(time.time())

    async def _note_uses(self) -> None:
        if uses := self._handles.uses_to_note():
            try:
                await self._journal.note_uses(uses)
            except JournalUnavailableError as error:
                logger.error("the last uses of %d pipelines are not kept: %s", len(uses), error)

    def _view_all(self) -> Census:
        if self._census is None:
            snapshots = {record.name: record.snapshot for record in self._supervisor.workers.values()}
            self._census = Census(self._handles, snapshots, self._generations.counts())
        return self._census

    def _changed(self) -> None:
        self._census = None
        self._changes.notify()
        self._readiness.note_change()
        if not self._is_publishing:
            # Once for all changes of this turn of the loop, and under load once for all of a moment: every watcher is
            # told of each, and each generation changes its pipeline more than once.
            self._is_publishing = True
            loop = asyncio.get_running_loop()
            loop.call_at(max(loop.time(), self._published + self._publish_interval), self._publish)

    def _publish(self) -> None:
        self._is_publishing = False
        self._published = asyncio.get_running_loop().time()
        self._observer.pipelines_changed(Counter(handle.state for handle in self._handles))
        if self._watchers:
            self._watchers.publish(self._view_all())


def _shutting_down() -> ShuttingDownError:
    return ShuttingDownError("The daemon is shutting down.", hint="Send the request to another one, or later.")


def _unloaded(handle: Handle) -> PipelineUnloadedError:
    return PipelineUnloadedError(
        f"{handle.name} was unloaded.", hint="Load it again.", metadata={"pipeline": handle.name}
    )

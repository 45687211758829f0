"""One worker: takes commands, and answers each with events."""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import os
import platform
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import diffusers.utils.logging
import torch
import transformers.utils.logging
from denoised import traces
from denoised.errors import DenoisedError, InternalError, PipelineNotFoundError
from denoised.values import Artifact, Plain
from denoised_server import request_context
from denoised_server.executor.child import Emit
from denoised_server.messages import (
    Access,
    Beat,
    Command,
    Derivation,
    Derive,
    Done,
    Event,
    Failed,
    Generate,
    Heartbeat,
    HeldComponent,
    Hold,
    Load,
    Loaded,
    LoadProgress,
    MemoryStats,
    Plan,
    Ready,
    Recipe,
    Reply,
    Snapshot,
    Unload,
    Unloaded,
    Update,
    Watch,
    WorkerSettings,
)
from denoised_server.request_context import RequestContext
from diffusers import DiffusionPipeline
from torch import nn

from . import callbacks, host_memory, noise_schedulers, overlay, plain_config, prompt_encoding, signature
from .adapters import Adapted, AdapterStore
from .balance import Balance
from .batches import Outcome
from .callbacks import Answer
from .components import ComponentStore
from .configuration import Variants, configure
from .construction import Construction
from .delivery import Delivery
from .device_memory import DeviceMemory
from .digest_table import DigestTable
from .digests import Digests
from .embeddings import Embeddings
from .engine import Cancelled, Engine, Request
from .fairness import Entrant
from .generation import STEP_SECONDS_BOUNDS, Generation, failure
from .ledger import Ledger
from .load_deadline import LoadDeadline
from .load_pace import LoadPace
from .loading import Live, Loader, Wanted
from .memory_counts import MemoryCounts
from .observations import Observations
from .overrides import bring_weights
from .planning import Planner
from .previews import Previews
from .recovery import Recovery
from .residency import Residency
from .sources import EMBEDDED, Sources
from .tiers import Tier
from .workspace import Workspace

logger = logging.getLogger(__name__)

# What decides the bits of an output.
LIBRARIES = ("diffusers", "peft", "torch", "transformers")
# Loads that may wait for the Hub at a time; a thread that waits costs nothing.
MAX_DOWNLOADS = 64
# Pictures that are decoded or encoded at a time, beside the engine.
MEDIA_THREADS = min(8, max(2, os.cpu_count() or 2))
# Seconds without work after which memory is given back that was freed and not used again.
REST_SECONDS = 5.0
# Seconds.
RELEASE_PAUSES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


@dataclass(slots=True, eq=False)
class _Task:
    """One command under way."""

    number: int
    command: Any
    emit: Emit
    is_cancelled: bool = False
    request: Request | None = None
    adapted: Adapted | None = None
    deadline: LoadDeadline | None = None
    context: RequestContext = field(default_factory=request_context.current)


class Worker:
    """Owns one device. Commands run beside each other; none waits for the engine but those that generate."""

    def __init__(self, settings: WorkerSettings) -> None:
        torch.set_num_threads(settings.threads)
        # Loading is reported to callers; bars on the daemon's terminal are nobody's.
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        # They warn of each component that an adapter has no weights for.
        for name in ("diffusers.loaders", "transformers.integrations.peft"):
            logging.getLogger(name).setLevel(logging.ERROR)
        overlay.install()
        self._construction = construction = Construction()
        construction.install()
        self._device, self._max_pixels = torch.device(settings.device), settings.max_pixels
        self._memory = DeviceMemory(self._device)
        self._total_bytes = self._memory.total_bytes
        self._store = ComponentStore()
        self._ledger = Ledger.of_device(
            self._total_bytes,
            weights=settings.budget,
            working_set=settings.working_set,
            headroom=settings.headroom,
            part=settings.part,
        )
        self._memory_counts = MemoryCounts()
        sources = Sources(
            settings.allow_dirs,
            repos=settings.allow_repos,
            pinned=settings.pinned_revisions,
            allow_pickle=settings.allow_pickle,
        )
        self._digests = digests = Digests(sources.hub_cache, table=DigestTable(settings.state_dir))
        self._residency = residency = Residency(
            self._store,
            self._ledger,
            construction,
            self._device,
            digests,
            self._memory_counts,
            host_bytes=host_memory.of_machine(settings.host_memory),
        )
        self._adapters = AdapterStore(self._store, residency, sources, construction, digests)
        self._loader = Loader(
            self._store, residency, sources, self._adapters, construction, self._device, digests, self._memory_counts
        )
        self._planner = Planner(self._store, residency, sources, construction, digests, self._loader.speed)
        embeddings = Embeddings(settings.embeddings_bytes, settings.embeddings_ttl)
        self._engine = Engine(
            construction,
            residency,
            max_joined=settings.max_joined,
            device=self._device,
            recovery=Recovery(
                self._device,
                counts=self._memory_counts,
                room=residency,
                workspace=Workspace(self._device, self._ledger, self._memory, residency, self._memory_counts),
                clear=embeddings.clear,
            ),
            embeddings=embeddings,
        )
        self._load_allowance = settings.load_timeout, settings.load_bytes_per_second
        self._variants = Variants(construction)
        self._step_seconds = Observations(STEP_SECONDS_BOUNDS)
        self._pipelines: dict[str, Live] = {}
        # Held to register, to unload and to look at tasks: an unload that follows a cancelled load finds the pipeline,
        # or nothing of it.
        self._lock = threading.Lock()
        # Held from looking to telling, so that nothing older is told last.
        self._telling = threading.Lock()
        self._tasks: dict[int, _Task] = {}
        self._unloads: list[_Task] = []
        self._closed = threading.Event()
        self._downloads = ThreadPoolExecutor(MAX_DOWNLOADS, "fetch")
        self._loads = ThreadPoolExecutor(1, "load")
        # Apart from the others: a request whose adapter is being fetched keeps nobody waiting but those with others.
        self._adapting = ThreadPoolExecutor(1, "adapters")
        self._controls = ThreadPoolExecutor(1, "control")
        self._media = ThreadPoolExecutor(MEDIA_THREADS, "media")
        self._previews = Previews(self._media)
        # Requests sleep until theirs is there: it waits for no encoding and no unload.
        self._replies = ThreadPoolExecutor(1, "reply")
        self._balance, self._rest = Balance(self._memory.allocated_bytes), host_memory.Rest(REST_SECONDS)

    def ready(self) -> Ready:
        cuda = self._device.type == "cuda"
        return Ready(
            pid=os.getpid(),
            host=platform.node(),
            device=str(self._device),
            device_name=torch.cuda.get_device_name(self._device) if cuda else platform.machine(),
            library_versions={name: importlib.metadata.version(name) for name in LIBRARIES},
            embedded_models=tuple(EMBEDDED),
        )

    def submit(self, number: int, command: Command, emit: Emit) -> None:
        """Starts a command and returns; its events go to `emit`, from any thread, the last one Done or Failed."""
        task = _Task(number, command, emit)
        with self._lock:
            self._tasks[number] = task
        match command:
            case Load():
                self._downloads.submit(self._fetch, task, command.recipe, command.access, self._load)
            case Plan():
                self._downloads.submit(self._answer, task, lambda: self._plan(task, command))
            case Derive(derivation=Derivation() as derivation) if bring_weights(derivation.overrides):
                # What reads weights takes its turn with loads.
                self._downloads.submit(self._fetch, task, derivation, command.access, self._derive)
            case Derive():
                self._controls.submit(self._answer, task, lambda: self._derive(task, command.derivation))
            case Update():
                room = self._adapting if command.settings.adapters else self._controls
                room.submit(self._answer, task, lambda: self._update(task, command))
            case Hold():
                self._controls.submit(self._answer, task, lambda: self._hold(command))
            case Unload():
                self._unload_when_unused(task, command)
            case Generate():
                if command.adapters is not None:
                    self._adapting.submit(self._prepare, task, command)
                elif _is_plain(command.arguments) and self._has_noise_scheduler(command):
                    # A thread would take longer to wake than this takes.
                    self._prepare(task, command)
                else:
                    self._media.submit(self._prepare, task, command)
            case Reply():
                self._replies.submit(self._answer, task, lambda: self._reply(command))
            case Beat():
                work = partial(self._answer, task, lambda: self._beat(task, command))
                threading.Thread(target=work, name="heart", daemon=True).start()
            case Watch():
                work = partial(self._answer, task, lambda: self._watch(task, command))
                threading.Thread(target=work, name="watch", daemon=True).start()

    def cancel(self, number: int) -> None:
        """Stops a command at its next call, component or report; it still ends with Done or Failed."""
        with self._lock:
            task = self._tasks.get(number)
            if task is None:
                return
            task.is_cancelled = True
            request = task.request
        if request is not None:
            self._engine.cancel(request)

    def close(self) -> None:
        self._closed.set()
        # Calls that wait for components end with it.
        self._residency.close()
        self._engine.close()
        self._digests.close()

    def _answer(self, task: _Task, work: Callable[[], Sequence[Event]]) -> None:
        """Runs a command to its end, whatever that is: Rust libraries panic with more than Exceptions.

        `work` returns the last events: they leave with the end in one message.
        """
        with request_context.use(task.context):
            try:
                self._check_cancelled(task)
                last = work()
            except BaseException as raised:
                self._end(task, _bare(raised))
            else:
                self._end(task, None, *last)

    def _end(self, task: _Task, error: BaseException | None, *last: Event) -> None:
        """`error` as `_bare` leaves it."""
        if task.adapted is not None:
            # The engine, whose thread this may be, never waits for adapters that are being made.
            self._adapting.submit(self._adapters.unpin, task.adapted)
        with self._lock:
            del self._tasks[task.number]
            unloads = self._unloads_now_due()
        task.emit(*last, Failed(error) if isinstance(error, DenoisedError) else Done())
        for unload in unloads:
            self._controls.submit(self._answer, unload, partial(self._unload, unload))

    def _check_cancelled(self, task: _Task) -> None:
        if task.is_cancelled or self._closed.is_set():
            raise Cancelled

    def _check_load(self, task: _Task) -> None:
        """Raises what ends a load that is on its way."""
        self._check_cancelled(task)
        if task.deadline is not None:
            task.deadline.check(time.monotonic())

    def _find(self, pipeline: str) -> Live:
        live = self._pipelines.get(pipeline)
        if live is None:
            raise PipelineNotFoundError(f"This worker holds no {pipeline}.")
        return live

    def _fetch(
        self,
        task: _Task,
        wanted: Wanted,
        access: Access,
        build: Callable[[_Task, Wanted], Sequence[Event]],
    ) -> None:
        """On a thread of its own: a long download holds nobody up. What follows takes its turn."""
        task.deadline = LoadDeadline(*self._load_allowance)
        task.deadline.resume(time.monotonic())
        try:
            self._check_load(task)
            fetched = self._loader.fetch(wanted, access, _following(task), partial(self._check_load, task))
        except BaseException as raised:
            self._end(task, _bare(raised))
        else:
            # Until its turn comes, which others decide.
            task.deadline.pause(time.monotonic())
            self._loads.submit(self._answer, task, lambda: build(task, fetched))

    def _plan(self, task: _Task, command: Plan) -> Sequence[Event]:
        return (self._planner.plan(command.recipe, command.access, lambda: self._check_cancelled(task)),)

    def _load(self, task: _Task, recipe: Recipe) -> Sequence[Event]:
        name = task.command.pipeline
        return self._bring(task, lambda check: self._loader.load(name, recipe, _following(task), check))

    def _derive(self, task: _Task, derivation: Derivation | None) -> Sequence[Event]:
        command = task.command
        source = self._find(command.source)
        return self._bring(
            task,
            lambda check: self._loader.derive(
                command.pipeline, source, derivation, command.settings, _following(task), check
            ),
        )

    def _bring(self, task: _Task, build: Callable[[Callable[[], None]], Live]) -> Sequence[Event]:
        """Has a pipeline built and makes it known."""
        error: BaseException | None = None
        if task.deadline is not None:
            task.deadline.resume(time.monotonic())
        try:
            with traces.span("build", task.context.trace, worker=task.context.worker):
                live = build(partial(self._check_load, task))
            self._residency.keep(task.command.pipeline, task.command.keep)
            self._register(task, task.command.pipeline, live)
        except BaseException as raised:
            error = _bare(raised)
        if error is not None:
            # Here, not in the handler: a live exception pins the half-built modules of its frames.
            self._loader.release(task.command.pipeline)
            self._residency.let_go(task.command.pipeline)
            _return_memory()
            self._report()
            raise error
        self._report()
        return (_loaded(live),)

    def _update(self, task: _Task, command: Update) -> Sequence[Event]:
        live = self._loader.update(command.pipeline, self._find(command.pipeline), command.settings)
        with self._lock:
            self._check_cancelled(task)
            self._pipelines[command.pipeline] = live
        return (_loaded(live),)

    def _hold(self, command: Hold) -> Sequence[Event]:
        self._find(command.pipeline)
        self._residency.keep(command.pipeline, command.keep)
        return ()

    def _register(self, task: _Task, pipeline: str, live: Live) -> None:
        with self._lock:
            if not task.is_cancelled:
                self._pipelines[pipeline] = live
                return
        raise Cancelled

    def _unload_when_unused(self, task: _Task, command: Unload) -> None:
        with self._lock:
            self._unloads.append(task)
            due = self._unloads_now_due()
        for unload in due:
            self._controls.submit(self._answer, unload, partial(self._unload, unload))

    def _unloads_now_due(self) -> list[_Task]:
        """Takes out the unloads of pipelines that no generation runs: a cancelled one holds on until its next call."""
        used = {task.command.pipeline for task in self._tasks.values() if isinstance(task.command, Generate)}
        due = [task for task in self._unloads if task.command.pipeline not in used]
        self._unloads = [task for task in self._unloads if task not in due]
        return due

    def _unload(self, task: _Task) -> Sequence[Event]:
        pipeline, freed = task.command.pipeline, 0
        self._engine.drop_proofs(pipeline)
        with self._lock:
            # What is still being loaded is its load's to let go of, which was cancelled before this came.
            is_held = self._pipelines.pop(pipeline, None) is not None
            self._residency.let_go(pipeline)
        if is_held:
            released = self._loader.release(pipeline)
            freed = released.freed_bytes
            _return_memory(released.modules)
        self._report()
        return (Unloaded(freed),)

    def _prepare(self, task: _Task, command: Generate) -> None:
        """Decodes what came, sees to the adapters, then hands the request to the engine."""
        try:
            with request_context.use(task.context):
                generation = self._make_generation(task, command)
        except BaseException as raised:
            error = _bare(raised if isinstance(raised, Cancelled) else failure(raised))
        else:
            finish = partial(self._finish, task, generation)
            deadline = None if command.timeout is None else time.monotonic() + command.timeout
            request = Request(
                generation,
                finish,
                pipeline=command.pipeline,
                entrant=Entrant(command.client, command.priority, deadline),
                alone=command.forbid_batching,
            )
            with self._lock:
                task.request, request.is_cancelled = request, task.is_cancelled
            self._residency.begin(command.pipeline)
            self._engine.submit(request)
            return
        self._end(task, error)

    def _make_generation(self, task: _Task, command: Generate) -> Generation:
        self._check_cancelled(task)
        pipeline = self._adapted(task, command)
        if command.noise_scheduler is not None:
            pipeline = self._variants.make(pipeline, command.noise_scheduler)
        enabled, digests = self._find(command.pipeline).settings.features, self._adapter_digests(command)
        generation = Generation(
            command,
            pipeline,
            self._device,
            task.emit,
            self._step_seconds,
            enabled,
            digests,
            max_pixels=self._max_pixels,
            previews=self._previews,
        )
        generation.prepare()
        return generation

    def _has_noise_scheduler(self, command: Generate) -> bool:
        """Whether the one that the request brings, if it does, was made before."""
        live, wanted = self._pipelines.get(command.pipeline), command.noise_scheduler
        return live is None or wanted is None or self._variants.find(live.pipeline, wanted) is not None

    def _adapted(self, task: _Task, command: Generate) -> DiffusionPipeline:
        """The pipeline with the adapters that the request asks for."""
        live = self._find(command.pipeline)
        if command.adapters is None:
            return live.pipeline
        adaptation = live.adaptation.using(command.adapters, self._adapters.find)
        task.adapted = self._adapters.adapt(live.built, adaptation, command.pipeline)
        with self._construction.turn():
            return configure(task.adapted.pipeline, live.settings)

    def _reply(self, command: Reply) -> Sequence[Event]:
        with self._lock:
            talking = [
                task.request
                for task in self._tasks.values()
                if isinstance(task.command, Generate) and task.command.conversation == command.conversation
            ]
        for request in talking:
            if request is not None:
                self._engine.wake(request, Answer(command))
        return ()

    def _adapter_digests(self, command: Generate) -> tuple[str, ...]:
        """Those of the files that the request's adapters are in."""
        known = {lora.name: lora.file.digest for lora in self._find(command.pipeline).adaptation.loras}
        return tuple(
            known[adapter.name] if adapter.source is None else self._adapters.find(adapter.source).digest
            for adapter in command.adapters or ()
        )

    def _finish(self, task: _Task, generation: Generation, request: Request, outcome: Outcome) -> None:
        """On the engine's thread: encodes what came out there only where that takes less than waking another."""
        self._residency.end(task.command.pipeline)
        for phase in request.costs.phases.runs():
            traces.record(phase.name, task.context.trace, phase.start_time, phase.end_time, worker=task.context.worker)
        if (error := outcome.error) is not None:
            with request_context.use(task.context):
                self._end(task, _bare(error if isinstance(error, Cancelled) else failure(error)))
            return

        try:
            encoding = generation.encoding(outcome.value)
        except BaseException as raised:
            self._end(task, _bare(raised))
            return
        delivery = Delivery(
            encoding.jobs,
            check=partial(self._check_cancelled, task),
            emit=task.emit,
            end=partial(self._deliver, task, generation, outcome.value, time.time()),
            summary=partial(generation.finished, encoding, request.costs),
        )
        if encoding.is_light:
            delivery.run()
        else:
            delivery.start(self._media)

    def _deliver(
        self,
        task: _Task,
        generation: Generation,
        result: Any,
        began: float,
        error: BaseException | None,
        *last: Event,
    ) -> None:
        traces.record("encode", task.context.trace, began, time.time(), worker=task.context.worker)
        with request_context.use(task.context):
            self._end(task, error and _bare(error), *last)
        if error is None and generation.learns:
            self._media.submit(generation.learn, result)

    def _watch(self, task: _Task, command: Watch) -> Sequence[Event]:
        last = None
        while True:
            self._check_cancelled(task)
            with self._telling:
                if (snapshot := self._snapshot()) != last:
                    task.emit(snapshot)
            last = snapshot
            self._closed.wait(command.interval)

    def _beat(self, task: _Task, command: Beat) -> Sequence[Event]:
        while True:
            self._check_cancelled(task)
            task.emit(Heartbeat(self._engine.turn_seconds))
            self._closed.wait(command.interval)

    def _report(self) -> None:
        """Tells watchers at once, before the answer to whoever changed something: who asks then finds it changed."""
        with self._lock:
            watching = [task for task in self._tasks.values() if isinstance(task.command, Watch)]
        with self._telling:
            for task in watching:
                task.emit(self._snapshot())

    def _snapshot(self) -> Snapshot:
        counts, held = self._engine.batches.counts, self._store.snapshot()
        return Snapshot(
            total_bytes=self._total_bytes,
            budget_bytes=self._ledger.budget_bytes,
            weight_bytes=self._ledger.weight_bytes,
            reserved_bytes=self._ledger.reserved_bytes,
            process_bytes=self._memory.process_bytes,
            components=held,
            calls=counts["calls"],
            batches=counts["batches"],
            joined_calls=counts["joined_calls"],
            verified_kinds=counts["verified_kinds"],
            refused_kinds=counts["refused_kinds"],
            methods=tuple(tally.stats(name) for name, tally in sorted(self._engine.batches.tallies.items())),
            batch_sizes=self._engine.batches.sizes.histogram(),
            step_seconds=self._step_seconds.histogram(),
            device_seconds=dict(self._engine.batches.device_seconds),
            memory=self._memory_stats(held),
            batch_stops=self._engine.stops,
            fused_requests=counts["fused_requests"],
            fusible_kinds=counts["fusible_kinds"],
            unfusible_kinds=counts["unfusible_kinds"],
            embedding_hits=counts["embedding_hits"],
            embedding_bytes=self._engine.embeddings.size_bytes,
        )

    def _memory_stats(self, held: Sequence[HeldComponent]) -> MemoryStats:
        booked = self._ledger.weight_bytes + self._engine.embeddings.size_bytes
        if self._device.type == "cpu":
            # What is in the host's memory comes from the same allocator.
            booked += sum(part.weight_bytes for part in held if part.residency == Tier.HOST)
        is_idle, now = self._is_idle(), time.monotonic()
        if self._rest.look(is_idle=is_idle, now=now):
            host_memory.trim()
        if self._balance.strike(self._memory.allocated_bytes, booked, is_idle=is_idle, now=now):
            logger.warning(
                "%d bytes are in use beside %d bytes of weights, and in no book",
                self._balance.unaccounted_bytes,
                booked,
            )
        counts = self._memory_counts
        return MemoryStats(
            working_set_bytes=self._balance.working_set_bytes,
            working_set_budget_bytes=self._ledger.working_set_bytes,
            headroom_bytes=self._ledger.headroom_bytes,
            cached_bytes=self._memory.cached_bytes,
            free_bytes=self._memory.free_bytes,
            evictable_bytes=self._residency.evictable_bytes,
            unreclaimed_bytes=self._residency.unreclaimed_bytes,
            unaccounted_bytes=self._balance.unaccounted_bytes,
            evictions=counts.evictions,
            eviction_ages=counts.eviction_ages,
            recoveries=counts.recoveries,
            estimate_ratios=counts.estimate_ratios,
            arrivals=counts.arrivals,
            arrived_bytes=counts.arrived_bytes,
        )

    def _is_idle(self) -> bool:
        with self._lock:
            return self._residency.is_settled and all(
                isinstance(task.command, Watch | Beat) for task in self._tasks.values()
            )


def _following(task: _Task) -> Callable[[LoadProgress], None]:
    """Adds to what is told of a load when its phase will end, and gives it time for the bytes that it has."""
    pace, emit = LoadPace(), task.emit

    def tell(told: LoadProgress) -> None:
        if task.deadline is not None:
            task.deadline.note(told.phase, told.completed_bytes, told.total_bytes)
        remaining = pace.remaining(told.phase, told.completed_bytes, told.total_bytes, time.monotonic())
        emit(told if remaining is None else replace(told, expected_end_time=time.time() + remaining))

    return tell


def _is_plain(value: Plain) -> bool:
    """Whether there is no media to decode."""
    match value:
        case Artifact():
            return False
        case Mapping():
            return all(map(_is_plain, value.values()))
        case list() | tuple():
            return all(map(_is_plain, value))
    return True


def _bare(error: BaseException) -> BaseException:
    """Cancelled, or one of ours for a client to see, without the frames that it came through; the log has the rest."""
    if not isinstance(error, Cancelled | DenoisedError):
        logger.error("a command failed", exc_info=error)
        name = type(error).__name__
        error = InternalError(f"The worker failed with {name}.", hint="The daemon's log has the rest.")
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _loaded(live: Live) -> Loaded:
    pipeline_class: Any = type(live.pipeline)
    return Loaded(
        task=live.task,
        pipeline_class=pipeline_class.__name__,
        components=live.components,
        parameters=signature.parameters(pipeline_class),
        revision=live.recipe.spec.revision,
        recipe=live.recipe,
        settings=live.settings,
        adapters=live.adapters,
        noise_scheduler=noise_schedulers.describe(getattr(live.pipeline, "scheduler", None)),
        config=plain_config.of(live.pipeline),
        component_configs=plain_config.of_components(live.pipeline),
        encode_parameters=signature.parameters(pipeline_class, prompt_encoding.METHOD),
        callback_tensor_inputs=callbacks.tensor_inputs(live.pipeline),
    )


def _return_memory(modules: Sequence[weakref.ref[nn.Module]] = ()) -> None:
    """Modules are in reference cycles, and allocators keep what was freed: both have to be told.

    A request that has just ended may still be on another thread's stack, so there are a few tries.
    """
    for pause in RELEASE_PAUSES:
        gc.collect()
        if all(module() is None for module in modules):
            break
        time.sleep(pause)
    else:
        logger.warning("unloaded weights are still referenced")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    host_memory.trim()

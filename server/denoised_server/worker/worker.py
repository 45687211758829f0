"""One worker: takes commands, and answers each with events."""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import os
import platform
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers.utils.logging
import psutil
import torch
import transformers.utils.logging
from denoised.errors import DenoisedError, InternalError, PipelineNotFoundError
from denoised_server.messages import (
    Command,
    Derive,
    Done,
    End,
    Event,
    Failed,
    Generate,
    Load,
    Loaded,
    Ready,
    Snapshot,
    Unload,
    Unloaded,
    Watch,
    WorkerSettings,
)

from . import host_memory, overlay, signature
from .components import ComponentStore
from .construction import Construction
from .engine import Cancelled, Engine, Request
from .generation import STEP_SECONDS_BOUNDS, Generation, failure
from .ledger import Ledger
from .loading import Live, Loader
from .observations import Observations
from .sources import EMBEDDED, Sources

logger = logging.getLogger(__name__)

# What decides the bits of an output.
LIBRARIES = ("diffusers", "torch", "transformers")
Emit = Callable[[Event | End], None]


class Worker:
    """Owns one device. Commands run beside each other; none waits for the engine but those that generate."""

    def __init__(self, settings: WorkerSettings) -> None:
        torch.set_num_threads(settings.threads)
        # Loading is reported to callers; bars on the daemon's terminal are nobody's.
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        overlay.install()
        construction = Construction()
        construction.install()
        self._device = torch.device(settings.device)
        self._total_bytes = _total_bytes(self._device)
        share = isinstance(settings.budget, float)
        budget = int(settings.budget * self._total_bytes) if share else settings.budget
        self._store, self._ledger = ComponentStore(), Ledger(int(budget))
        sources = Sources(settings.allow_dirs)
        self._loader = Loader(self._store, self._ledger, sources, construction, self._device)
        self._engine = Engine(construction, max_joined=settings.max_joined, device=self._device)
        self._step_seconds = Observations(STEP_SECONDS_BOUNDS)
        self._pipelines: dict[str, Live] = {}
        self._requests: dict[int, Request] = {}
        self._cancelled: set[int] = set()
        self._watchers: dict[int, Emit] = {}
        # Held to register and to unload: an unload that follows a cancelled load finds the pipeline, or nothing of it.
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._loads = ThreadPoolExecutor(1, "load")
        self._controls = ThreadPoolExecutor(1, "control")
        self._media = ThreadPoolExecutor(2, "media")

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
        match command:
            case Load():
                self._loads.submit(self._answer, number, emit, lambda: self._load(number, command, emit))
            case Derive():
                self._controls.submit(self._answer, number, emit, lambda: self._derive(number, command, emit))
            case Unload():
                self._controls.submit(self._answer, number, emit, lambda: self._unload(command, emit))
            case Generate():
                self._media.submit(self._prepare, number, command, emit)
            case Watch():
                watch = threading.Thread(
                    target=self._answer, args=(number, emit, lambda: self._watch(number, command, emit)), daemon=True
                )
                watch.start()

    def cancel(self, number: int) -> None:
        """Stops a command at its next call, component or report; it still ends with Done or Failed."""
        self._cancelled.add(number)
        if (request := self._requests.get(number)) is not None:
            self._engine.cancel(request)

    def close(self) -> None:
        self._closed.set()
        self._engine.close()

    def _answer(self, number: int, emit: Emit, work: Callable[[], None]) -> None:
        """Runs a command to its end, whatever that is."""
        try:
            self._check_cancelled(number)
            work()
        except (Cancelled, Exception) as error:
            self._end(number, emit, error)
        else:
            self._end(number, emit)

    def _end(self, number: int, emit: Emit, error: BaseException | None = None) -> None:
        self._cancelled.discard(number)
        if error is None or isinstance(error, Cancelled):
            emit(Done())
        elif isinstance(error, DenoisedError):
            emit(Failed(error.with_traceback(None)))
        else:
            logger.error("a command failed", exc_info=error)
            name = type(error).__name__
            emit(Failed(InternalError(f"The worker failed with {name}.", hint="The daemon's log has the rest.")))

    def _check_cancelled(self, number: int) -> None:
        if number in self._cancelled or self._closed.is_set():
            raise Cancelled

    def _find(self, pipeline: str) -> Live:
        live = self._pipelines.get(pipeline)
        if live is None:
            raise PipelineNotFoundError(f"This worker holds no {pipeline}.")
        return live

    def _load(self, number: int, command: Load, emit: Emit) -> None:
        try:
            live = self._loader.load(command.pipeline, command.recipe, emit, lambda: self._check_cancelled(number))
            self._register(number, command.pipeline, live)
        except BaseException:
            _return_memory()
            self._report()
            raise
        self._report()
        emit(_loaded(live))

    def _derive(self, number: int, command: Derive, emit: Emit) -> None:
        live = self._loader.derive(command.pipeline, self._find(command.source), command.derivation)
        self._register(number, command.pipeline, live)
        self._report()
        emit(_loaded(live))

    def _register(self, number: int, pipeline: str, live: Live) -> None:
        with self._lock:
            if number in self._cancelled:
                self._loader.release(pipeline)
                raise Cancelled
            self._pipelines[pipeline] = live

    def _unload(self, command: Unload, emit: Emit) -> None:
        freed = 0
        with self._lock:
            # What is still being loaded is its load's to let go of, which was cancelled before this came.
            if self._pipelines.pop(command.pipeline, None) is not None:
                freed = self._loader.release(command.pipeline)
        if freed:
            _return_memory()
        self._report()
        emit(Unloaded(freed))

    def _prepare(self, number: int, command: Generate, emit: Emit) -> None:
        """On a media thread: decodes what came, then hands the request to the engine."""
        try:
            self._check_cancelled(number)
            live = self._find(command.pipeline)
            generation = Generation(command, live.pipeline, self._device, emit, self._step_seconds)
            generation.prepare()
        except (Cancelled, Exception) as error:
            self._end(number, emit, error)
            return
        request = Request(
            generation.run,
            lambda result, error: self._finish(number, generation, request, result, error, emit),
            priority=command.priority,
            alone=command.forbid_batching,
        )
        self._requests[number] = request
        if number in self._cancelled:
            request.cancelled = True
        self._engine.submit(request)

    def _finish(
        self,
        number: int,
        generation: Generation,
        request: Request,
        result: object,
        error: BaseException | None,
        emit: Emit,
    ) -> None:
        """On the engine's thread: passes what came out on to a media thread."""
        del self._requests[number]

        def encode() -> None:
            if error is not None:
                raise error if isinstance(error, Cancelled) else failure(error)
            emit(generation.encode(result, request))

        self._media.submit(self._answer, number, emit, encode)

    def _watch(self, number: int, command: Watch, emit: Emit) -> None:
        self._watchers[number] = emit
        last = None
        try:
            while True:
                self._check_cancelled(number)
                if (snapshot := self._snapshot()) != last:
                    emit(snapshot)
                last = snapshot
                self._closed.wait(command.interval)
        finally:
            del self._watchers[number]

    def _report(self) -> None:
        """Tells watchers at once, before the answer to whoever changed something: who asks then finds it changed."""
        for emit in list(self._watchers.values()):
            emit(self._snapshot())

    def _snapshot(self) -> Snapshot:
        counts = self._engine.counts
        return Snapshot(
            total_bytes=self._total_bytes,
            budget_bytes=self._ledger.budget_bytes,
            weight_bytes=self._ledger.weight_bytes,
            reserved_bytes=self._ledger.reserved_bytes,
            process_bytes=_process_bytes(self._device),
            components=self._store.snapshot(),
            calls=counts["calls"],
            batches=counts["batches"],
            joined_calls=counts["joined_calls"],
            verified_kinds=self._engine.verified_kinds,
            refused_kinds=self._engine.refused_kinds,
            batch_sizes=self._engine.batch_sizes.histogram(),
            step_seconds=self._step_seconds.histogram(),
        )


def _loaded(live: Live) -> Loaded:
    pipeline_class: Any = type(live.pipeline)
    return Loaded(
        task=live.task,
        pipeline_class=pipeline_class.__name__,
        components=live.components,
        parameters=signature.parameters(pipeline_class),
        revision=live.revision,
    )


def _total_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def _process_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    return int(psutil.Process().memory_info().rss)


def _return_memory() -> None:
    """Modules are in reference cycles, and allocators keep what was freed: both have to be told."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    host_memory.trim()

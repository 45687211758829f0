"""Counts what the front-end tells it, for Prometheus to read; `metric_set` says what there is."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence

from denoised import traces
from denoised.errors import BY_REASON
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from . import metric_set
from .handles import State
from .messages import Snapshot
from .metric_set import Definition
from .observer import Course, Observer
from .reports import Reports

OUTCOMES = ("ok", "cancelled", *(reason.lower() for reason in BY_REASON))
# Errors that say no before anything was done.
REFUSALS = (
    "queue_full",
    "quota_exceeded",
    "deadline_unmeetable",
    "deadline_too_short",
    "workers_drained",
    "no_room",
    "never_fits",
    "message_too_large",
    "source_not_allowed",
    "unauthenticated",
    "scope_missing",
    "not_owner",
    "shutting_down",
    "journal_unavailable",
)
LOAD_PHASES = ("looking_up", "downloading", "reading_weights", "moving_to_device")
OTHER = "other"
# Models that have a label of their own; whoever may load could otherwise fill Prometheus.
MAX_MODELS = 32


class Metrics(Observer):
    """Counts by labels that are known beforehand, and those of the first models.

    `methods` are the names of the RPCs, `workers` those of the workers: known labels start at zero, so that rates are
    right from the first event on.
    """

    def __init__(self, *, version: str, methods: Sequence[str], workers: Sequence[str]) -> None:
        self.registry = CollectorRegistry()
        self._models: set[str] = set()
        self._requests = self._counter(metric_set.REQUESTS)
        self._request_seconds = self._histogram(metric_set.REQUEST_SECONDS)
        self._refusals = self._counter(metric_set.REFUSALS)
        self._running = self._gauge(metric_set.RUNNING)
        self._waiting = self._gauge(metric_set.WAITING)
        self._generations = self._counter(metric_set.GENERATIONS)
        self._latency = self._histogram(metric_set.LATENCY)
        self._queue_time = self._histogram(metric_set.QUEUE_TIME)
        self._phase_seconds = self._histogram(metric_set.PHASE_SECONDS)
        self._steps = self._counter(metric_set.STEPS)
        self._images = self._counter(metric_set.IMAGES)
        self._pixels = self._counter(metric_set.PIXELS)
        self._replays = self._counter(metric_set.REPLAYS)
        self._pipelines = self._gauge(metric_set.PIPELINES)
        self._loads = self._counter(metric_set.LOADS)
        self._load_seconds = self._histogram(metric_set.LOAD_SECONDS)
        self._load_phases = self._counter(metric_set.LOAD_PHASE_SECONDS)
        self._expirations = self._counter(metric_set.EXPIRATIONS)
        self._restarts = self._counter(metric_set.RESTARTS)
        self._recycles = self._counter(metric_set.RECYCLES)
        self._journal_waiting = self._gauge(metric_set.JOURNAL_WAITING)
        self._journal_lag = self._histogram(metric_set.JOURNAL_LAG)
        self._journal_failures = self._counter(metric_set.JOURNAL_FAILURES)
        self._gauge(metric_set.BUILD_INFO).labels(version, platform.python_version()).set(1)
        self._gauge(metric_set.START_TIME).set(time.time())
        self._reports = Reports(workers)
        self.registry.register(self._reports)
        self._begin_at_zero(methods, workers)

    def _begin_at_zero(self, methods: Sequence[str], workers: Sequence[str]) -> None:
        for method in methods:
            self._request_seconds.labels(method)
            for outcome in OUTCOMES:
                self._requests.labels(method, outcome)
        for worker in workers:
            for metric in (self._running, self._waiting, self._restarts, self._recycles):
                metric.labels(worker)
        for state in State:
            self._pipelines.labels(state)
        for outcome in OUTCOMES:
            self._loads.labels(outcome)
        for reason in REFUSALS:
            self._refusals.labels(reason)
        for phase in metric_set.PHASES:
            self._phase_seconds.labels(phase)
        for phase in (*LOAD_PHASES, OTHER):
            self._load_phases.labels(phase)
        self._begin_model(OTHER)

    def _begin_model(self, model: str) -> None:
        for metric in (self._queue_time, self._images, self._pixels):
            metric.labels(model)
        for use in ("useful", "wasted"):
            self._steps.labels(model, use)

    def request_ended(self, method: str, outcome: str, seconds: float) -> None:
        self._requests.labels(method, outcome).inc()
        self._request_seconds.labels(method).observe(seconds, _exemplar())
        if outcome in REFUSALS:
            self._refusals.labels(outcome).inc()

    def queue_changed(self, worker: str, *, running: int, waiting: int) -> None:
        self._running.labels(worker).set(running)
        self._waiting.labels(worker).set(waiting)

    def generation_admitted(self, repo_id: str, queue_seconds: float) -> None:
        self._queue_time.labels(self._model(repo_id)).observe(queue_seconds, _exemplar())

    def generation_replayed(self) -> None:
        self._replays.inc()

    def generation_ended(self, course: Course) -> None:
        model, is_ok = self._model(course.repo_id), course.outcome == "ok"
        self._generations.labels(model, course.task, course.outcome).inc()
        self._steps.labels(model, "useful" if is_ok else "wasted").inc(course.steps)
        self._images.labels(model).inc(course.images)
        self._pixels.labels(model).inc(course.pixels)
        if is_ok:
            self._latency.labels(model, course.task).observe(course.seconds, _exemplar())
            for phase, seconds in course.phases.items():
                self._phase_seconds.labels(phase).observe(seconds)

    def load_ended(self, repo_id: str, outcome: str, seconds: float, phases: Mapping[str, float]) -> None:
        self._loads.labels(outcome).inc()
        self._load_seconds.observe(seconds)
        for phase, spent in phases.items():
            name = phase.replace(" ", "_")
            self._load_phases.labels(name if name in LOAD_PHASES else OTHER).inc(spent)
        # Only what exists and may be loaded gets a label: anybody can ask for anything.
        model = alias(repo_id)
        if outcome == "ok" and model not in self._models and len(self._models) < MAX_MODELS:
            self._models.add(model)
            self._begin_model(model)

    def pipelines_changed(self, counts: Mapping[str, int]) -> None:
        for state in State:
            self._pipelines.labels(state).set(counts.get(state, 0))

    def pipeline_expired(self) -> None:
        self._expirations.inc()

    def worker_reported(self, worker: str, snapshot: Snapshot) -> None:
        self._reports.report(worker, snapshot)

    def worker_lost(self, worker: str) -> None:
        self._reports.lose(worker)

    def worker_recycled(self, worker: str) -> None:
        self._recycles.labels(worker).inc()

    def worker_restarted(self, worker: str) -> None:
        self._restarts.labels(worker).inc()

    def journal_asked(self) -> None:
        self._journal_waiting.inc()

    def journal_failed(self) -> None:
        self._journal_failures.inc()

    def journal_answered(self, seconds: float) -> None:
        self._journal_waiting.dec()
        self._journal_lag.observe(seconds)

    def _model(self, repo_id: str) -> str:
        model = alias(repo_id)
        return model if model in self._models else OTHER

    def _counter(self, definition: Definition) -> Counter:
        name = definition.name.removesuffix("_total")
        return Counter(name, definition.text, list(definition.labels), registry=self.registry)

    def _gauge(self, definition: Definition) -> Gauge:
        return Gauge(definition.name, definition.text, list(definition.labels), registry=self.registry)

    def _histogram(self, definition: Definition) -> Histogram:
        labels = list(definition.labels)
        return Histogram(definition.name, definition.text, labels, buckets=definition.buckets, registry=self.registry)


def _exemplar() -> dict[str, str] | None:
    """The trace to look at for an example, where the call that is being worked on has one."""
    trace_id = traces.trace_id()
    return {"trace_id": trace_id} if trace_id else None


def alias(repo_id: str) -> str:
    """A repository's name; of a directory only the last part, for the rest is nobody's business."""
    parts = repo_id.replace("\\", "/").rstrip("/").split("/")
    return repo_id if len(parts) <= 2 and parts[0] not in ("", ".", "..", "~") else parts[-1]

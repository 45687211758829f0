"""Metrics, for Prometheus to read: the front-end's own, and those that workers report."""

from __future__ import annotations

import threading
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIServer

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

from denoised.errors import BY_REASON
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from . import messages
from .handles import State
from .messages import Snapshot
from .observer import Observer
from .views import TIERS

# Calls take from milliseconds to many minutes.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
OUTCOMES = ("ok", "cancelled", *(reason.lower() for reason in BY_REASON))


class Metrics(Observer):
    """Counts what the front-end tells it. No label ever holds what a caller has chosen.

    `methods` are the names of the RPCs, `workers` those of the workers: known labels start at zero, so that rates are
    right from the first event on.
    """

    def __init__(self, *, version: str, methods: Sequence[str], workers: Sequence[str]) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "denoised_requests", "Calls that ended, by outcome.", ["method", "outcome"], registry=registry
        )
        self._request_seconds = Histogram(
            "denoised_request_seconds", "Time from a call's start to its end.", ["method"], buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self._queue_seconds = Histogram(
            "denoised_queue_seconds", "Time that generations waited to be admitted.", buckets=SECONDS, registry=registry
        )
        self._running = Gauge("denoised_requests_running", "Generations running.", ["worker"], registry=registry)
        self._waiting = Gauge("denoised_requests_waiting", "Generations waiting.", ["worker"], registry=registry)
        self._images = Counter("denoised_images", "Images made.", registry=registry)
        self._pipelines = Gauge("denoised_pipelines", "Pipelines held, by state.", ["state"], registry=registry)
        self._loads = Counter("denoised_loads", "Pipelines built, by outcome.", ["outcome"], registry=registry)
        self._load_seconds = Histogram(
            "denoised_load_seconds", "Time that building a pipeline took.", buckets=SECONDS, registry=registry
        )
        self._restarts = Counter(
            "denoised_worker_restarts", "Times a worker was started again.", ["worker"], registry=registry
        )
        info = Gauge("denoised_build_info", "What is running; always 1.", ["version"], registry=registry)
        info.labels(version).set(1)
        self._reports = Reports(workers)
        registry.register(self._reports)
        for method in methods:
            self._request_seconds.labels(method)
            for outcome in OUTCOMES:
                self._requests.labels(method, outcome)
        for worker in workers:
            for metric in (self._running, self._waiting, self._restarts):
                metric.labels(worker)
        for state in State:
            self._pipelines.labels(state)
        for outcome in OUTCOMES:
            self._loads.labels(outcome)

    def request_ended(self, method: str, outcome: str, seconds: float) -> None:
        self._requests.labels(method, outcome).inc()
        self._request_seconds.labels(method).observe(seconds)

    def queue_changed(self, worker: str, *, running: int, waiting: int) -> None:
        self._running.labels(worker).set(running)
        self._waiting.labels(worker).set(waiting)

    def admitted(self, queue_seconds: float) -> None:
        self._queue_seconds.observe(queue_seconds)

    def images_made(self, count: int) -> None:
        self._images.inc(count)

    def load_ended(self, outcome: str, seconds: float) -> None:
        self._loads.labels(outcome).inc()
        self._load_seconds.observe(seconds)

    def pipelines_changed(self, counts: Mapping[str, int]) -> None:
        for state in State:
            self._pipelines.labels(state).set(counts.get(state, 0))

    def worker_reported(self, worker: str, snapshot: Snapshot) -> None:
        self._reports.report(worker, snapshot)

    def worker_lost(self, worker: str) -> None:
        self._reports.lose(worker)

    def worker_restarted(self, worker: str) -> None:
        self._restarts.labels(worker).inc()


@dataclass(frozen=True, slots=True)
class _Counts:
    """What a worker counts from its start on, and therefore loses with its process."""

    calls: int = 0
    batches: int = 0
    joined_calls: int = 0
    lone_calls: Tally[str] = field(default_factory=Tally)
    batch_sizes: messages.Histogram | None = None
    step_seconds: messages.Histogram | None = None

    @classmethod
    def of(cls, snapshot: Snapshot) -> _Counts:
        return cls(
            snapshot.calls,
            snapshot.batches,
            snapshot.joined_calls,
            sum((Tally(stats.lone_calls) for stats in snapshot.methods), Tally()),
            snapshot.batch_sizes,
            snapshot.step_seconds,
        )

    def __add__(self, other: _Counts) -> _Counts:
        return _Counts(
            self.calls + other.calls,
            self.batches + other.batches,
            self.joined_calls + other.joined_calls,
            self.lone_calls + other.lone_calls,
            _add(self.batch_sizes, other.batch_sizes),
            _add(self.step_seconds, other.step_seconds),
        )


@dataclass(frozen=True, slots=True)
class _Report:
    """What is known of one worker: the counts of its earlier lives, and the last snapshot of this one."""

    before: _Counts = _Counts()
    snapshot: Snapshot | None = None

    @property
    def counts(self) -> _Counts:
        return self.before + _Counts.of(self.snapshot) if self.snapshot else self.before


class Reports(Collector):
    """Metrics from the workers' snapshots. Counts go on over a worker's restart, as Prometheus expects of them."""

    def __init__(self, workers: Sequence[str]) -> None:
        # Each report is replaced as a whole: the server for metrics reads them on a thread of its own.
        self._reports = dict.fromkeys(workers, _Report())

    def report(self, worker: str, snapshot: Snapshot) -> None:
        self._reports[worker] = replace(self._reports[worker], snapshot=snapshot)

    def lose(self, worker: str) -> None:
        self._reports[worker] = _Report(before=self._reports[worker].counts)

    def collect(self) -> Iterator[Metric]:
        reports = tuple(self._reports.items())
        yield from self._memory(reports)
        counters: Sequence[tuple[str, str, Callable[[_Counts], int]]] = (
            ("denoised_engine_calls", "Component calls that requests made.", lambda counts: counts.calls),
            ("denoised_engine_batches", "Batches that component calls ran as.", lambda counts: counts.batches),
            (
                "denoised_engine_joined_calls",
                "Component calls that shared a batch.",
                lambda counts: counts.joined_calls,
            ),
        )
        for name, text, count in counters:
            counter = CounterMetricFamily(name, text, labels=["worker"])
            for worker, report in reports:
                counter.add_metric([worker], count(report.counts))
            yield counter
        lone = CounterMetricFamily(
            "denoised_engine_lone_calls", "Component calls that ran alone, by reason.", labels=["worker", "reason"]
        )
        for worker, report in reports:
            for reason, calls in report.counts.lone_calls.items():
                lone.add_metric([worker, reason], calls)
        yield lone
        histograms: Sequence[tuple[str, str, Callable[[_Counts], messages.Histogram | None]]] = (
            ("denoised_batch_size", "Calls joined into one batch.", lambda counts: counts.batch_sizes),
            ("denoised_denoise_step_seconds", "Time between steps of a request.", lambda counts: counts.step_seconds),
        )
        for name, text, get in histograms:
            family = HistogramMetricFamily(name, text, labels=["worker"])
            for worker, report in reports:
                if (observed := get(report.counts)) is not None:
                    bounds = [
                        (_text(bound), count) for bound, count in zip(observed.bounds, observed.counts, strict=True)
                    ]
                    family.add_metric([worker], [*bounds, ("+Inf", observed.count)], observed.sum)
            yield family

    def _memory(self, reports: Sequence[tuple[str, _Report]]) -> Iterator[Metric]:
        components = GaugeMetricFamily(
            "denoised_component_bytes", "Weights held, each component counted once.", labels=["worker", "residency"]
        )
        memory = GaugeMetricFamily("denoised_device_memory_bytes", "Memory of a device.", labels=["worker", "kind"])
        for worker, report in reports:
            snapshot = report.snapshot
            held = Tally[str]()
            for part in snapshot.components if snapshot else ():
                held[part.residency] += part.weight_bytes
            for tier in TIERS:
                components.add_metric([worker, tier], held[tier])
            for kind in ("total", "budget", "weight", "reserved", "process"):
                memory.add_metric([worker, kind], getattr(snapshot, f"{kind}_bytes") if snapshot else 0)
        yield components
        yield memory


class MetricsServer:
    """Answers Prometheus over HTTP, on a thread of its own."""

    def __init__(self, registry: CollectorRegistry, *, host: str, port: int) -> None:
        self._server: WSGIServer
        self._thread: threading.Thread
        self._server, self._thread = start_http_server(port, host, registry)
        self._metrics = make_wsgi_app(registry)

    def probe(self, answer: Callable[[str], tuple[int, str] | None]) -> None:
        """Answers paths of probes too: `answer` returns a status and a text, or None for what is no probe's."""

        def serve(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            found = answer(str(environ.get("PATH_INFO", "")))
            if found is None:
                page: Iterable[bytes] = self._metrics(environ, start_response)
                return page
            status, text = found
            start_response(f"{status} {HTTPStatus(status).phrase}", [("Content-Type", "text/plain; charset=utf-8")])
            return [text.encode()]

        self._server.set_app(serve)

    @property
    def port(self) -> int:
        return self._server.server_port

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _add(one: messages.Histogram | None, other: messages.Histogram | None) -> messages.Histogram | None:
    if one is None or other is None:
        return one or other
    return messages.Histogram(
        bounds=other.bounds,
        counts=tuple(a + b for a, b in zip(one.counts, other.counts, strict=True)),
        count=one.count + other.count,
        sum=one.sum + other.sum,
    )


def _text(bound: float) -> str:
    return repr(float(bound))

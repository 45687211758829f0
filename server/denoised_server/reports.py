"""What workers report of themselves, as metrics on the front-end's page."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from . import messages, metric_set
from .messages import Snapshot
from .views import TIERS

MEMORY_KINDS = ("total", "budget", "weight", "reserved", "process")
OTHER_MEMORY_KINDS = (
    "working_set",
    "working_set_budget",
    "headroom",
    "cached",
    "free",
    "evictable",
    "unaccounted",
    "unreclaimed",
)


@dataclass(frozen=True, slots=True)
class _Counts:
    """What a worker counts from its start on, and therefore loses with its process."""

    calls: int = 0
    batches: int = 0
    joined_calls: int = 0
    fused_requests: int = 0
    embedding_hits: int = 0
    lone_calls: Tally[str] = field(default_factory=lambda: Tally(dict.fromkeys(metric_set.LONE_REASONS, 0)))
    batch_stops: Tally[str] = field(default_factory=Tally)
    batch_sizes: messages.Histogram | None = None
    step_seconds: messages.Histogram | None = None
    device_seconds: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(metric_set.CALL_PHASES, 0.0))
    # By reason and tier.
    evictions: Tally[tuple[str, str]] = field(default_factory=Tally)
    eviction_ages: messages.Histogram | None = None
    recoveries: Tally[str] = field(default_factory=Tally)
    estimate_ratios: Mapping[str, messages.Histogram] = field(default_factory=dict)
    # By tier.
    arrivals: Mapping[str, messages.Histogram] = field(default_factory=dict)
    arrived_bytes: Tally[str] = field(default_factory=Tally)

    @classmethod
    def of(cls, snapshot: Snapshot) -> _Counts:
        memory = snapshot.memory
        return cls(
            calls=snapshot.calls,
            batches=snapshot.batches,
            joined_calls=snapshot.joined_calls,
            fused_requests=snapshot.fused_requests,
            embedding_hits=snapshot.embedding_hits,
            lone_calls=sum((Tally(stats.lone_calls) for stats in snapshot.methods), Tally()),
            batch_stops=Tally(snapshot.batch_stops),
            batch_sizes=snapshot.batch_sizes,
            step_seconds=snapshot.step_seconds,
            device_seconds=snapshot.device_seconds,
            evictions=Tally(
                {(why, tier): count for why, tiers in memory.evictions.items() for tier, count in tiers.items()}
            ),
            eviction_ages=memory.eviction_ages,
            recoveries=Tally(memory.recoveries),
            estimate_ratios=memory.estimate_ratios,
            arrivals=memory.arrivals,
            arrived_bytes=Tally(memory.arrived_bytes),
        )

    def __add__(self, other: _Counts) -> _Counts:
        return _Counts(
            calls=self.calls + other.calls,
            batches=self.batches + other.batches,
            joined_calls=self.joined_calls + other.joined_calls,
            lone_calls=_sum(self.lone_calls, other.lone_calls),
            batch_stops=_sum(self.batch_stops, other.batch_stops),
            fused_requests=self.fused_requests + other.fused_requests,
            embedding_hits=self.embedding_hits + other.embedding_hits,
            batch_sizes=_add(self.batch_sizes, other.batch_sizes),
            step_seconds=_add(self.step_seconds, other.step_seconds),
            device_seconds={
                phase: self.device_seconds.get(phase, 0) + other.device_seconds.get(phase, 0)
                for phase in {*self.device_seconds, *other.device_seconds}
            },
            evictions=_sum(self.evictions, other.evictions),
            eviction_ages=_add(self.eviction_ages, other.eviction_ages),
            recoveries=_sum(self.recoveries, other.recoveries),
            estimate_ratios=_add_all(self.estimate_ratios, other.estimate_ratios),
            arrivals=_add_all(self.arrivals, other.arrivals),
            arrived_bytes=_sum(self.arrived_bytes, other.arrived_bytes),
        )


@dataclass(frozen=True, slots=True)
class _Report:
    """What is known of one worker: the counts of its earlier lives, and the last snapshot of this one."""

    before: _Counts = _Counts()
    snapshot: Snapshot | None = None

    @property
    def counts(self) -> _Counts:
        return self.before + _Counts.of(self.snapshot) if self.snapshot else self.before


_Reported = Sequence[tuple[str, _Report]]


class Reports(Collector):
    """Counts go on over a worker's restart, as Prometheus expects of them; gauges of a dead worker are not there."""

    def __init__(self, workers: Sequence[str]) -> None:
        # Each report is replaced as a whole: the server for metrics reads them on a thread of its own.
        self._reports = dict.fromkeys(workers, _Report())

    def report(self, worker: str, snapshot: Snapshot) -> None:
        self._reports[worker] = replace(self._reports[worker], snapshot=snapshot)

    def lose(self, worker: str) -> None:
        self._reports[worker] = _Report(before=self._reports[worker].counts)

    def collect(self) -> Iterator[Metric]:
        reports = tuple(self._reports.items())
        yield from self._gauges(reports)
        yield from self._counters(reports)
        yield from self._histograms(reports)

    def _gauges(self, reports: _Reported) -> Iterator[Metric]:
        up, memory, components, saved, kinds = (
            GaugeMetricFamily(each.name, each.text, labels=list(each.labels))
            for each in (
                metric_set.WORKER_UP,
                metric_set.MEMORY,
                metric_set.COMPONENTS,
                metric_set.SAVED,
                metric_set.KINDS,
            )
        )
        for worker, report in reports:
            snapshot = report.snapshot
            up.add_metric([worker], int(snapshot is not None))
            if snapshot is None:
                continue
            held = Tally[str]()
            for part in snapshot.components:
                held[part.residency] += part.weight_bytes
            for tier in TIERS:
                components.add_metric([worker, tier], held[tier])
            for kind in MEMORY_KINDS:
                memory.add_metric([worker, kind], getattr(snapshot, f"{kind}_bytes"))
            for kind in OTHER_MEMORY_KINDS:
                memory.add_metric([worker, kind], getattr(snapshot.memory, f"{kind}_bytes"))
            saved.add_metric([worker], snapshot.shared_saved_bytes)
            kinds.add_metric([worker, "verified"], snapshot.verified_kinds)
            kinds.add_metric([worker, "refused"], snapshot.refused_kinds)
        yield from (up, memory, components, saved, kinds)

    def _counters(self, reports: _Reported) -> Iterator[Metric]:
        counters: Sequence[tuple[metric_set.Definition, Callable[[_Counts], Mapping[tuple[str, ...], float]]]] = (
            (metric_set.CALLS, lambda counts: {(): counts.calls}),
            (metric_set.BATCHES, lambda counts: {(): counts.batches}),
            (metric_set.JOINED, lambda counts: {(): counts.joined_calls}),
            (metric_set.FUSED, lambda counts: {(): counts.fused_requests}),
            (metric_set.EMBEDDING_HITS, lambda counts: {(): counts.embedding_hits}),
            (metric_set.LONE_CALLS, lambda counts: _by_label(counts.lone_calls)),
            (metric_set.BATCH_STOPS, lambda counts: _by_label(counts.batch_stops)),
            (metric_set.DEVICE_SECONDS, lambda counts: _by_label(counts.device_seconds)),
            (metric_set.EVICTIONS, lambda counts: {(*labels,): times for labels, times in counts.evictions.items()}),
            (metric_set.ARRIVED, lambda counts: _by_label(counts.arrived_bytes)),
            (metric_set.RECOVERIES, lambda counts: _by_label(counts.recoveries)),
        )
        for definition, get in counters:
            counter = CounterMetricFamily(definition.name, definition.text, labels=list(definition.labels))
            for worker, report in reports:
                for labels, value in sorted(get(report.counts).items()):
                    counter.add_metric([worker, *labels], value)
            yield counter

    def _histograms(self, reports: _Reported) -> Iterator[Metric]:
        histograms: Sequence[tuple[metric_set.Definition, Callable[[_Counts], messages.Histogram | None]]] = (
            (metric_set.BATCH_SIZE, lambda counts: counts.batch_sizes),
            (metric_set.STEP_TIME, lambda counts: counts.step_seconds),
            (metric_set.EVICTION_AGE, lambda counts: counts.eviction_ages),
        )
        for definition, get in histograms:
            family = HistogramMetricFamily(definition.name, definition.text, labels=list(definition.labels))
            for worker, report in reports:
                bounds = tuple(map(float, definition.buckets))
                seen = get(report.counts) or messages.Histogram(bounds, (0,) * len(bounds), 0, 0.0)
                _observe(family, [worker], seen)
            yield family
        labelled: Sequence[tuple[metric_set.Definition, Callable[[_Counts], Mapping[str, messages.Histogram]]]] = (
            (metric_set.ESTIMATE_RATIO, lambda counts: counts.estimate_ratios),
            (metric_set.ARRIVAL_TIME, lambda counts: counts.arrivals),
        )
        for definition, get_all in labelled:
            family = HistogramMetricFamily(definition.name, definition.text, labels=list(definition.labels))
            for worker, report in reports:
                for label, each in sorted(get_all(report.counts).items()):
                    _observe(family, [worker, label], each)
            yield family


def _observe(family: HistogramMetricFamily, labels: Sequence[str], seen: messages.Histogram) -> None:
    buckets = [(repr(bound), count) for bound, count in zip(seen.bounds, seen.counts, strict=True)]
    family.add_metric(labels, [*buckets, ("+Inf", seen.count)], seen.sum)


def _add_all(
    one: Mapping[str, messages.Histogram], other: Mapping[str, messages.Histogram]
) -> dict[str, messages.Histogram]:
    return {name: seen for name in {*one, *other} if (seen := _add(one.get(name), other.get(name)))}


def _by_label(values: Mapping[str, float]) -> dict[tuple[str, ...], float]:
    return {(label,): value for label, value in values.items()}


L = TypeVar("L")


def _sum(one: Tally[L], other: Tally[L]) -> Tally[L]:
    """Unlike `+`, with what is zero: a series that is not there has no rate."""
    return Tally({label: one[label] + other[label] for label in {*one, *other}})


def _add(one: messages.Histogram | None, other: messages.Histogram | None) -> messages.Histogram | None:
    if one is None or other is None:
        return one or other
    return messages.Histogram(
        bounds=other.bounds,
        counts=tuple(a + b for a, b in zip(one.counts, other.counts, strict=True)),
        count=one.count + other.count,
        sum=one.sum + other.sum,
    )

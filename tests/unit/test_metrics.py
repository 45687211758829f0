"""Metrics: names, labels that are known beforehand, and counts that outlive a worker."""

from __future__ import annotations

import platform
import urllib.request
from dataclasses import replace

import pytest
from denoised.values import Artifact
from denoised_server.course import extent
from denoised_server.exposition import MetricsServer
from denoised_server.messages import HeldComponent, Histogram, MemoryStats, MethodStats, Output, Snapshot
from denoised_server.metric_set import ARRIVAL_TIME, DEFINITIONS, ESTIMATE_RATIO, EVICTION_AGE
from denoised_server.metrics import MAX_MODELS, Metrics, alias
from denoised_server.observer import Course
from denoised_server.worker.tallies import Lone
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

SNAPSHOT = Snapshot(
    total_bytes=10_000,
    budget_bytes=9_000,
    weight_bytes=3_000,
    reserved_bytes=100,
    process_bytes=5_000,
    components=(
        HeldComponent("sha-a", "UNet", 2_000, ("pipelines/secret", "pipelines/other")),
        HeldComponent("sha-b", "VAE", 1_000, ("pipelines/secret",), residency="host"),
    ),
    calls=10,
    batches=4,
    joined_calls=8,
    verified_kinds=1,
    refused_kinds=0,
    batch_sizes=Histogram((1.0, 2.0), (1, 4), 4, 7.0),
    step_seconds=Histogram((0.1, 1.0), (5, 9), 10, 3.5),
    methods=(
        MethodStats("UNet.forward", 9, 8, {"unmatched": 1}, 1, 0, 0.01, None),
        MethodStats("VAE.decode", 1, 0, {"unmatched": 1}, 0, 0, None, None),
    ),
    device_seconds={"denoise": 1.5},
    batch_stops={"full": 3},
    memory=MemoryStats(
        cached_bytes=400,
        unaccounted_bytes=-7,
        evictions={"room": {"device": 2, "host": 0}},
        eviction_ages=Histogram(tuple(map(float, EVICTION_AGE.buckets)), (0, 1, *(2,) * 7), 2, 17.0),
        recoveries={"split": 1, "none": 0},
        arrivals={"disk": Histogram(tuple(map(float, ARRIVAL_TIME.buckets)), (*(0,) * 5, *(2,) * 8), 2, 0.4)},
        arrived_bytes={"disk": 2000},
        estimate_ratios={
            "weights": Histogram(tuple(map(float, ESTIMATE_RATIO.buckets)), (*(0,) * 4, *(1,) * 7), 1, 0.95),
        },
    ),
)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(version="1.2.3", methods=("Generate", "GetPipeline"), workers=("workers/0", "workers/1"))


def read(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_known_labels_start_at_zero(metrics: Metrics) -> None:
    assert read(metrics, "denoised_requests_total", method="Generate", outcome="queue_full") == 0
    assert read(metrics, "denoised_refusals_total", reason="quota_exceeded") == 0
    assert read(metrics, "denoised_num_requests_running", worker="workers/1") == 0
    assert read(metrics, "denoised_pipelines", state="loading") == 0
    assert read(metrics, "denoised_loads_total", outcome="no_room") == 0
    assert read(metrics, "denoised_load_phase_seconds_total", phase="reading_weights") == 0
    assert read(metrics, "denoised_worker_restarts_total", worker="workers/0") == 0
    assert read(metrics, "denoised_engine_calls_total", worker="workers/0") == 0
    for reason in Lone:
        assert read(metrics, "denoised_engine_lone_calls_total", worker="workers/0", reason=reason) == 0
    assert read(metrics, "denoised_engine_device_seconds_total", worker="workers/0", phase="decode") == 0
    assert read(metrics, "denoised_request_phase_seconds_count", phase="queue") == 0
    assert read(metrics, "denoised_batch_size_bucket", worker="workers/0", le="+Inf") == 0
    assert read(metrics, "denoised_worker_up", worker="workers/0") == 0
    assert read(metrics, "denoised_build_info", version="1.2.3", python=platform.python_version()) == 1


def test_changes_that_wait_for_the_disk_are_seen_while_they_wait(metrics: Metrics) -> None:
    metrics.journal_asked()
    assert read(metrics, "denoised_journal_changes_waiting") == 1
    metrics.journal_answered(0.2)
    assert read(metrics, "denoised_journal_changes_waiting") == 0
    assert read(metrics, "denoised_journal_write_seconds_count") == 1
    assert read(metrics, "denoised_journal_failures_total") == 0


def test_what_is_served_is_what_the_set_defines(metrics: Metrics) -> None:
    metrics.worker_reported("workers/0", SNAPSHOT)
    served = {family.name: family for family in metrics.registry.collect()}
    defined = {each.name.removesuffix("_total"): each for each in DEFINITIONS}
    assert set(served) == set(defined)
    for name, definition in defined.items():
        family = served[name]
        assert family.documentation == definition.text
        assert family.type == definition.kind
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert labels <= set(definition.labels), name
        assert name.endswith(definition.unit), name


def test_calls_are_counted_by_outcome_and_timed(metrics: Metrics) -> None:
    metrics.request_ended("Generate", "ok", 0.02)
    metrics.request_ended("Generate", "queue_full", 0.001)
    assert read(metrics, "denoised_requests_total", method="Generate", outcome="queue_full") == 1
    assert read(metrics, "denoised_request_seconds_count", method="Generate") == 2
    assert read(metrics, "denoised_request_seconds_bucket", method="Generate", le="0.025") == 2
    assert read(metrics, "denoised_refusals_total", reason="queue_full") == 1


def test_generations_are_counted_by_the_models_that_were_loaded(metrics: Metrics) -> None:
    metrics.load_ended("owner/painter", "ok", 2.0, {"reading weights": 1.5, "humming a tune": 0.5})
    metrics.load_ended("owner/secret", "repo_not_found", 0.1, {})
    assert read(metrics, "denoised_images_total", model="owner/painter") == 0
    for repo_id in ("owner/painter", "owner/secret"):
        metrics.generation_admitted(repo_id, 0.2)
        metrics.generation_ended(Course(repo_id, "text-to-image", "ok", 1.5, 20, 1, 4096, {"denoise": 1.2}))
    metrics.generation_ended(Course("owner/painter", "text-to-image", "cancelled", 0.5, 3))
    for model in ("owner/painter", "other"):
        labels = {"model": model, "task": "text-to-image"}
        assert read(metrics, "denoised_generations_total", **labels, outcome="ok") == 1
        assert read(metrics, "denoised_e2e_request_latency_seconds_sum", **labels) == 1.5
        assert read(metrics, "denoised_request_queue_time_seconds_count", model=model) == 1
        assert read(metrics, "denoised_denoise_steps_total", model=model, use="useful") == 20
        assert read(metrics, "denoised_pixels_total", model=model) == 4096
    assert read(metrics, "denoised_denoise_steps_total", model="owner/painter", use="wasted") == 3
    assert read(metrics, "denoised_request_phase_seconds_sum", phase="denoise") == 2.4
    assert read(metrics, "denoised_load_phase_seconds_total", phase="reading_weights") == 1.5
    assert read(metrics, "denoised_load_phase_seconds_total", phase="other") == 0.5
    assert b"secret" not in generate_latest(metrics.registry)


def test_only_so_many_models_get_a_label(metrics: Metrics) -> None:
    for number in range(MAX_MODELS + 5):
        metrics.load_ended(f"owner/model-{number}", "ok", 1.0, {})
        metrics.generation_ended(Course(f"owner/model-{number}", "text-to-image", "ok", 1.0, images=1))
    assert read(metrics, "denoised_images_total", model="owner/model-0") == 1
    assert read(metrics, "denoised_images_total", model=f"owner/model-{MAX_MODELS}") is None
    assert read(metrics, "denoised_images_total", model="other") == 5


@pytest.mark.parametrize(
    ("repo_id", "expected"),
    [
        ("demo", "demo"),
        ("owner/name", "owner/name"),
        ("/home/somebody/models/painter/", "painter"),
        ("./painter", "painter"),
        ("models/private/painter", "painter"),
    ],
)
def test_of_a_directory_only_the_last_part_is_shown(repo_id: str, expected: str) -> None:
    assert alias(repo_id) == expected


def test_gauges_show_the_last_that_was_told(metrics: Metrics) -> None:
    metrics.queue_changed("workers/0", running=3, waiting=2)
    metrics.queue_changed("workers/0", running=2, waiting=0)
    metrics.pipelines_changed({"active": 2})
    metrics.pipelines_changed({"loading": 1})
    assert read(metrics, "denoised_num_requests_running", worker="workers/0") == 2
    assert read(metrics, "denoised_num_requests_waiting", worker="workers/0") == 0
    assert read(metrics, "denoised_pipelines", state="active") == 0
    assert read(metrics, "denoised_pipelines", state="loading") == 1


def test_what_is_only_on_disk_saves_nothing_by_being_shared(metrics: Metrics) -> None:
    away = HeldComponent("sha-away", "VAE", 5_000, ("pipelines/a", "pipelines/b"), "disk")
    metrics.worker_reported("workers/0", replace(SNAPSHOT, components=(*SNAPSHOT.components, away)))
    assert read(metrics, "denoised_shared_saved_bytes", worker="workers/0") == 2_000


def test_snapshots_show_memory_and_work(metrics: Metrics) -> None:
    metrics.worker_reported("workers/0", SNAPSHOT)
    assert read(metrics, "denoised_device_memory_bytes", worker="workers/0", kind="weight") == 3_000
    assert read(metrics, "denoised_device_memory_bytes", worker="workers/0", kind="budget") == 9_000
    assert read(metrics, "denoised_component_bytes", worker="workers/0", residency="host") == 1_000
    assert read(metrics, "denoised_shared_saved_bytes", worker="workers/0") == 2_000
    assert read(metrics, "denoised_device_memory_bytes", worker="workers/0", kind="cached") == 400
    assert read(metrics, "denoised_device_memory_bytes", worker="workers/0", kind="unaccounted") == -7
    evictions = {"worker": "workers/0", "reason": "room"}
    assert read(metrics, "denoised_evictions_total", **evictions, tier="device") == 2
    assert read(metrics, "denoised_evictions_total", **evictions, tier="host") == 0
    assert read(metrics, "denoised_eviction_age_seconds_bucket", worker="workers/0", le="5.0") == 1
    assert read(metrics, "denoised_out_of_memory_total", worker="workers/0", rung="split") == 1
    assert read(metrics, "denoised_estimate_ratio_bucket", worker="workers/0", estimate="weights", le="0.98") == 1
    assert read(metrics, "denoised_engine_device_seconds_total", worker="workers/0", phase="denoise") == 1.5
    assert read(metrics, "denoised_engine_joined_calls_total", worker="workers/0") == 8
    assert read(metrics, "denoised_engine_lone_calls_total", worker="workers/0", reason="unmatched") == 2
    assert read(metrics, "denoised_batch_size_bucket", worker="workers/0", le="2.0") == 4
    assert read(metrics, "denoised_batch_size_bucket", worker="workers/0", le="+Inf") == 4
    assert read(metrics, "denoised_denoise_step_seconds_sum", worker="workers/0") == 3.5
    assert read(metrics, "denoised_denoise_step_seconds_count", worker="workers/0") == 10


def test_counts_never_fall_when_a_worker_starts_anew(metrics: Metrics) -> None:
    metrics.worker_reported("workers/0", SNAPSHOT)
    metrics.worker_lost("workers/0")
    assert read(metrics, "denoised_engine_calls_total", worker="workers/0") == 10
    assert read(metrics, "denoised_worker_up", worker="workers/0") == 0
    assert read(metrics, "denoised_device_memory_bytes", worker="workers/0", kind="weight") is None
    metrics.worker_restarted("workers/0")
    metrics.worker_reported("workers/0", replace(SNAPSHOT, calls=1))
    metrics.worker_reported("workers/0", replace(SNAPSHOT, calls=2))
    assert read(metrics, "denoised_engine_calls_total", worker="workers/0") == 12
    assert read(metrics, "denoised_batch_size_count", worker="workers/0") == 8
    assert read(metrics, "denoised_engine_batch_stops_total", worker="workers/0", reason="full") == 6
    assert read(metrics, "denoised_batch_size_bucket", worker="workers/0", le="1.0") == 2
    assert read(metrics, "denoised_evictions_total", worker="workers/0", reason="room", tier="device") == 4
    assert read(metrics, "denoised_evictions_total", worker="workers/0", reason="room", tier="host") == 0
    assert read(metrics, "denoised_eviction_age_seconds_sum", worker="workers/0") == 34
    assert read(metrics, "denoised_out_of_memory_total", worker="workers/0", rung="none") == 0
    assert read(metrics, "denoised_estimate_ratio_count", worker="workers/0", estimate="weights") == 2
    assert read(metrics, "denoised_worker_restarts_total", worker="workers/0") == 1


def test_they_are_served_over_http_without_what_callers_have_chosen(metrics: Metrics) -> None:
    metrics.worker_reported("workers/0", SNAPSHOT)
    server = MetricsServer(metrics.registry, host="127.0.0.1", port=0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as response:
            text = response.read().decode()
    finally:
        server.stop()
    assert "secret" not in text
    families = {family.name for family in text_string_to_metric_families(text)}
    assert {name for name in families if not name.startswith("denoised_")} == set()


@pytest.mark.parametrize(
    ("output_type", "shape", "images", "pixels"),
    [
        ("pil", (64, 48, 3), 1, 3072),
        ("np", (3, 64, 48, 3), 3, 9216),
        ("pt", (2, 3, 8, 4), 2, 64),
        ("latent", (2, 4, 8, 8), 0, 0),
    ],
)
def test_images_are_counted_in_whatever_shape_they_come(
    output_type: str, shape: tuple[int, ...], images: int, pixels: int
) -> None:
    output = Output("images", 0, Artifact("any", b"", "", shape), None, width=shape[-2], height=shape[-3])
    assert extent(output, output_type) == (images, pixels)

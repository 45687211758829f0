"""Metrics: names, labels that are known beforehand, and counts that outlive a worker."""

from __future__ import annotations

import urllib.request
from dataclasses import replace

import pytest
from denoised.values import Artifact
from denoised_server.generations import image_count
from denoised_server.messages import HeldComponent, Histogram, MethodStats, Output, Snapshot
from denoised_server.metrics import Metrics, MetricsServer
from prometheus_client.parser import text_string_to_metric_families

SNAPSHOT = Snapshot(
    total_bytes=10_000,
    budget_bytes=9_000,
    weight_bytes=3_000,
    reserved_bytes=100,
    process_bytes=5_000,
    components=(
        HeldComponent("sha-a", "UNet", 2_000, ("pipelines/secret",)),
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
)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(version="1.2.3", methods=("Generate", "GetPipeline"), workers=("workers/0", "workers/1"))


def read(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_known_labels_start_at_zero(metrics: Metrics) -> None:
    assert read(metrics, "denoised_requests_total", method="Generate", outcome="queue_full") == 0
    assert read(metrics, "denoised_requests_running", worker="workers/1") == 0
    assert read(metrics, "denoised_pipelines", state="loading") == 0
    assert read(metrics, "denoised_loads_total", outcome="no_room") == 0
    assert read(metrics, "denoised_worker_restarts_total", worker="workers/0") == 0
    assert read(metrics, "denoised_component_bytes", worker="workers/0", residency="device") == 0
    assert read(metrics, "denoised_build_info", version="1.2.3") == 1


def test_calls_are_counted_by_outcome_and_timed(metrics: Metrics) -> None:
    metrics.request_ended("Generate", "ok", 0.02)
    metrics.request_ended("Generate", "queue_full", 0.001)
    assert read(metrics, "denoised_requests_total", method="Generate", outcome="queue_full") == 1
    assert read(metrics, "denoised_request_seconds_count", method="Generate") == 2
    assert read(metrics, "denoised_request_seconds_bucket", method="Generate", le="0.025") == 2


def test_gauges_show_the_last_that_was_told(metrics: Metrics) -> None:
    metrics.queue_changed("workers/0", running=3, waiting=2)
    metrics.queue_changed("workers/0", running=2, waiting=0)
    metrics.pipelines_changed({"active": 2})
    metrics.pipelines_changed({"loading": 1})
    assert read(metrics, "denoised_requests_running", worker="workers/0") == 2
    assert read(metrics, "denoised_requests_waiting", worker="workers/0") == 0
    assert read(metrics, "denoised_pipelines", state="active") == 0
    assert read(metrics, "denoised_pipelines", state="loading") == 1


def test_snapshots_show_memory_and_work(metrics: Metrics) -> None:
    metrics.worker_reported("workers/0", SNAPSHOT)
    assert read(metrics, "denoised_device_memory_bytes", worker="workers/0", kind="weight") == 3_000
    assert read(metrics, "denoised_device_memory_bytes", worker="workers/0", kind="budget") == 9_000
    assert read(metrics, "denoised_component_bytes", worker="workers/0", residency="host") == 1_000
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
    assert read(metrics, "denoised_device_memory_bytes", worker="workers/0", kind="weight") == 0
    metrics.worker_restarted("workers/0")
    metrics.worker_reported("workers/0", replace(SNAPSHOT, calls=1))
    metrics.worker_reported("workers/0", replace(SNAPSHOT, calls=2))
    assert read(metrics, "denoised_engine_calls_total", worker="workers/0") == 12
    assert read(metrics, "denoised_batch_size_count", worker="workers/0") == 8
    assert read(metrics, "denoised_batch_size_bucket", worker="workers/0", le="1.0") == 2
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
    assert {
        "denoised_requests",
        "denoised_request_seconds",
        "denoised_queue_seconds",
        "denoised_requests_running",
        "denoised_requests_waiting",
        "denoised_images",
        "denoised_pipelines",
        "denoised_loads",
        "denoised_load_seconds",
        "denoised_worker_restarts",
        "denoised_component_bytes",
        "denoised_device_memory_bytes",
        "denoised_batch_size",
        "denoised_denoise_step_seconds",
        "denoised_build_info",
    } <= families


@pytest.mark.parametrize(
    ("output_type", "shape", "count"),
    [
        ("pil", (64, 48, 3), 1),
        ("pil", (), 1),
        ("np", (3, 64, 48, 3), 3),
        ("pt", (2, 3, 8, 8), 2),
        ("latent", (2, 4, 8, 8), 0),
    ],
)
def test_images_are_counted_in_whatever_shape_they_come(output_type: str, shape: tuple[int, ...], count: int) -> None:
    assert image_count(Output("images", 0, Artifact("any", b"", "", shape), None), output_type) == count

"""Traces and logs of a real daemon: spans arrive at a collector that speaks OTLP, lines at stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.daemon import Daemon

pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="the extra otel is not installed")

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

PHASES = ["text_encode", "denoise", "decode"]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that it is sent, each with the name of the service that it is from."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, Span]] = []
        self._lock = threading.Lock()
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
        add(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's own name
        with self._lock:
            for resource in request.resource_spans:
                names = [each.value.string_value for each in resource.resource.attributes if each.key == "service.name"]
                self._spans += [(names[0], span) for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait_for(self, name: str, count: int = 1) -> None:
        end = time.monotonic() + 20
        while len(self.named(name)) < count:
            assert time.monotonic() < end, f"no {name} among {[span.name for _, span in self._spans]}"
            time.sleep(0.05)

    def named(self, name: str) -> list[tuple[str, Span]]:
        with self._lock:
            return [(service, span) for service, span in self._spans if span.name == name]

    def path(self, span: Span) -> list[str]:
        """Names of its ancestors, from the root on, and its own."""
        with self._lock:
            by_id = {other.span_id: other for _, other in self._spans}
        names = [span.name]
        while span.parent_span_id:
            span = by_id[span.parent_span_id]
            names.insert(0, span.name)
        return names

    def stop(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def traced(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("traced")
    config = folder / "denoised.toml"
    config.write_text('log_format = "json"\n')
    with Daemon(
        folder / "state",
        "--config",
        str(config),
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint,
        OTEL_BSP_SCHEDULE_DELAY="100",
    ) as daemon:
        yield daemon


def command(daemon: Daemon, collector: Collector, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "denoised", *arguments, "--target", daemon.target],
        env=os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    return done.stdout


def test_a_generation_is_one_trace_from_the_client_to_the_encoded_image(
    traced: Daemon, collector: Collector, tmp_path: Path
) -> None:
    command(traced, collector, "load", "demo", "--task", "text-to-image", "--id", "painter")
    for name in ("build", "serve LoadPipeline", "denoised.LoadPipeline"):
        collector.wait_for(name)
    (service, build) = collector.named("build")[0]
    assert service == "denoised-worker"
    assert collector.path(build) == ["denoised.LoadPipeline", "serve LoadPipeline", "build"]
    arguments = ("-p", "red apple", "--steps", "4", "-o", str(tmp_path / "apple.png"))
    command(traced, collector, "generate", "painter", *arguments)
    for name in ("queue", "encode", "serve Generate", "denoised.Generate"):
        collector.wait_for(name)
    ((client, call),) = collector.named("denoised.Generate")
    ((daemon, serve),) = collector.named("serve Generate")
    assert (client, daemon) == ("denoised-cli", "denoised")
    assert (call.kind, serve.kind) == (Span.SPAN_KIND_CLIENT, Span.SPAN_KIND_SERVER)
    ((_, queue),) = collector.named("queue")
    spans = [queue]
    for name in (*PHASES, "encode"):
        ((service, span),) = [(service, span) for service, span in collector.named(name)]
        assert service == "denoised-worker"
        assert {each.key: each.value.string_value for each in span.attributes} == {"worker": "workers/0"}
        spans.append(span)
    for span in spans:
        assert collector.path(span) == ["denoised.Generate", "serve Generate", span.name]
        assert span.trace_id == call.trace_id
        assert call.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= call.end_time_unix_nano
    starts = [span.start_time_unix_nano for span in spans]
    assert starts == sorted(starts), "queue, then the phases in their order, then the encoding"


def test_an_error_is_in_its_span_by_its_reason(traced: Daemon, collector: Collector) -> None:
    before = len(collector.named("serve GetPipeline"))
    command(traced, collector, "generate", "nobody", "-p", "x", "-o", "x.png", code=1)
    collector.wait_for("serve GetPipeline", before + 1)
    _, span = collector.named("serve GetPipeline")[-1]
    assert span.status.message == "PIPELINE_NOT_FOUND"


def test_a_latency_has_the_trace_for_an_example(traced: Daemon, collector: Collector) -> None:
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    with urllib.request.urlopen(urllib.request.Request(traced.metrics_url, headers=accept), timeout=10) as response:
        assert response.headers["Content-Type"].startswith("application/openmetrics-text")
        lines = response.read().decode().splitlines()
    assert lines[-1] == "# EOF"
    latencies = [line for line in lines if line.startswith("denoised_e2e_request_latency_seconds_bucket")]
    examples = [line for line in latencies if " # " in line]
    ((_, span),) = collector.named("serve Generate")
    assert any(span.trace_id.hex() in line for line in examples), examples


def test_every_line_of_the_log_is_an_object_that_says_for_what_it_is(traced: Daemon, collector: Collector) -> None:
    lines = [json.loads(line) for line in traced.log]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    (line,) = [line for line in lines if line["message"].startswith("Generate ok")]
    assert line["worker"] == "workers/0"
    assert line["pipeline_class"] == "StableDiffusionPipeline"
    assert len(line["request_id"]) == 16
    ((_, span),) = collector.named("serve Generate")
    assert line["trace_id"] == span.trace_id.hex()


def test_lines_of_text_say_the_same_and_more_when_asked(tmp_path: Path) -> None:
    with Daemon(tmp_path / "state", "--verbose") as daemon, daemon.client() as client:
        pipe = client.load("demo", task="text-to-image")
        pipe("red apple", num_inference_steps=2)
        client.workers()
        daemon.stop()
    text = "".join(daemon.log)
    (line,) = [line for line in daemon.log if "Generate ok" in line]
    assert " INFO " in line
    assert "worker=workers/0 pipeline_class=StableDiffusionPipeline]" in line
    assert " DEBUG " in text
    assert "ListWorkers ok" in text, "dashboards' calls are worth a line only to whoever asks for more"

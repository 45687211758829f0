"""Health over gRPC and over HTTP: the same answers at every moment, and whoever watches hears of each change."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from denoised.v1 import worker_service_pb2 as pb
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.end_to_end.test_preload import probe
from tests.faults.victim import Victim

PROBES = {"liveness": "/healthz", "readiness": "/readyz", "startup": "/startupz"}
SERVICES = ("", "denoised.v1.PipelineService", "denoised.v1.GenerationService")
STATUS = health_pb2.HealthCheckResponse.ServingStatus


def test_both_say_the_same_at_every_moment(tmp_path: Path) -> None:
    victim = Victim(tmp_path, preload="slow,id=a", drain_grace=10)
    victim.launch()
    try:
        with grpc.insecure_channel(victim.target) as channel, victim.client() as client:
            stub = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=60)
            changes: Iterator[Any] = (response.status for response in watch)

            def seen() -> list[object]:
                """The health, and what the three probes say."""
                info = client.server_info()
                health = pb.Health.Name(info.health).removeprefix("HEALTH_").lower()
                answers: list[bool] = []
                for name, path in PROBES.items():
                    status, text = probe(f"http://{victim.metrics}/metrics", path)
                    assert text.splitlines() == [health, *info.health_reasons]
                    answers.append(_is_serving(stub, name))
                    assert answers[-1] == (status == 200), name
                assert all(_is_serving(stub, service) == answers[1] for service in SERVICES)
                assert _is_serving(stub, "denoised.v1.WorkerService")
                return [health, *answers]

            assert next(changes) == STATUS.NOT_SERVING
            assert seen() == ["starting", True, False, False]
            assert next(changes) == STATUS.SERVING
            assert seen() == ["ready", True, True, True]
            client.drain_worker("workers/0")
            assert next(changes) == STATUS.NOT_SERVING
            assert seen() == ["draining", True, False, True]
            client.resume_worker("workers/0")
            assert next(changes) == STATUS.SERVING
            victim.process.send_signal(signal.SIGTERM)
            assert next(changes) == STATUS.NOT_SERVING
            assert victim.wait() == 0
    finally:
        victim.kill()


def _is_serving(stub: Any, service: str) -> bool:
    response = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    return bool(response.status == STATUS.SERVING)

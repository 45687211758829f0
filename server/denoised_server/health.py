"""Health over gRPC: what the HTTP probes say, for each service, and for each probe by its Kubernetes name."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import grpc
from denoised.v1 import worker_service_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from . import probes
from .background import Background
from .pool import Pool

STATUS = health_pb2.HealthCheckResponse.ServingStatus
PROBES = {"liveness": "/healthz", "readiness": "/readyz", "startup": "/startupz"}
# Its service shows how things are, however they are.
ALWAYS_SERVING = worker_service_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name


@asynccontextmanager
async def serve(server: grpc.aio.Server, pool: Pool, services: Sequence[str]) -> AsyncGenerator[None, None]:
    """Answers grpc.health.v1 for the daemon, whose name is empty, for its services and for probes."""
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)

    shown = dict[str, bool]()

    async def follow() -> None:
        while True:
            found = statuses(pool, services)
            for service, is_serving in found.items():
                if is_serving != shown.get(service):
                    await servicer.set(service, STATUS.SERVING if is_serving else STATUS.NOT_SERVING)
            shown.update(found)
            await pool.until(lambda: statuses(pool, services) != shown)

    background = Background()
    background.spawn(follow(), name="health")
    try:
        yield
    finally:
        await background.stop()


def statuses(pool: Pool, services: Sequence[str]) -> dict[str, bool]:
    """Which of the names serves at the moment."""
    report = pool.health()
    found = {service: report.is_serving or service == ALWAYS_SERVING for service in ("", *services)}
    for name, path in PROBES.items():
        status, _ = probes.answer(path, report, has_started=pool.has_started) or (503, "")
        found[name] = status == 200
    return found

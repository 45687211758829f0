"""How a client reaches a daemon: target, channel options, retries, and failures as errors of ours."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc
from google.protobuf import empty_pb2
from google.protobuf.message import Message
from grpc.experimental import ChannelOptions

from . import status
from .errors import DenoisedError, InvalidFieldError, MessageTooLargeError
from .v1 import generation_service_pb2_grpc, pipeline_service_pb2_grpc, worker_service_pb2_grpc
from .version import __version__

# grpc.health.v1.HealthCheckResponse with the status SERVING.
SERVING = b"\x08\x01"
DEFAULT_PORT = 50051
DEFAULT_TARGET = f"127.0.0.1:{DEFAULT_PORT}"
TARGET_VARIABLE = "DENOISED_TARGET"
TOKEN_VARIABLE = "DENOISED_TOKEN"
CA_VARIABLE = "DENOISED_CA"
CLIENT_CERT_VARIABLE = "DENOISED_CLIENT_CERT"
CLIENT_KEY_VARIABLE = "DENOISED_CLIENT_KEY"
# In place of a file of authorities.
SYSTEM_CA = "system"
# gRPC itself stops at 4 MiB, which one large tensor exceeds.
MAX_MESSAGE_BYTES = 256 * 2**20
# Bound for calls that only ask the daemon something; loads and generations have none of their own.
SHORT_CALL_SECONDS = 60.0

IDEMPOTENT = {
    "denoised.v1.PipelineService": (
        "GetPipeline",
        "ListPipelines",
        "PlanPipeline",
        "RenewPipeline",
        "UnloadPipeline",
        "UpdatePipeline",
    ),
    "denoised.v1.GenerationService": ("GetGeneration", "ListGenerations", "CancelGeneration"),
    "denoised.v1.WorkerService": ("ListWorkers", "GetServerInfo", "DrainWorker", "ResumeWorker"),
}
SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [
                    {"service": name, "method": method} for name, methods in IDEMPOTENT.items() for method in methods
                ],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)

PathName: TypeAlias = "str | os.PathLike[str] | None"


@dataclass(frozen=True, slots=True)
class Stubs:
    """The services of one daemon. Untyped, because gRPC has the same stubs for blocking and asyncio channels."""

    pipelines: Any
    generations: Any
    workers: Any
    health: Any

    @classmethod
    def of(cls, channel: Any) -> Stubs:
        return cls(
            pipeline_service_pb2_grpc.PipelineServiceStub(channel),
            generation_service_pb2_grpc.GenerationServiceStub(channel),
            worker_service_pb2_grpc.WorkerServiceStub(channel),
            # Its package comes with the daemon; two bytes are no reason to ask for it here.
            channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=empty_pb2.Empty.SerializeToString,
                response_deserializer=bytes,
            ),
        )


def resolve_target(target: str | None) -> str:
    """Fills in what was left out: the environment's target, and the port."""
    target = target or os.environ.get(TARGET_VARIABLE) or DEFAULT_TARGET
    # gRPC itself would try port 443.
    is_whole = ":" in target and not target.endswith("]")
    return target if is_whole else f"{target}:{DEFAULT_PORT}"


def is_loopback(target: str) -> bool:
    """Whether the target names this machine."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    host = target.rsplit("/", 1)[-1].rsplit(":", 1)[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def channel_options(max_message_bytes: int, server_name: str | None) -> Sequence[tuple[str, Any]]:
    # For a target that is an address, while the certificate is for a name.
    named = (("grpc.ssl_target_name_override", server_name),) if server_name else ()
    return (
        *named,
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.primary_user_agent", f"denoised-python/{__version__}"),
        ("grpc.service_config", SERVICE_CONFIG),
        # Spares blocking streams a thread of their own: a millisecond or two of every generation.
        (ChannelOptions.SingleThreadedUnaryStream, 1),
        # A daemon that is started again is found within seconds, not after the two minutes that gRPC would come to
        # wait, and each client looks for itself.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        ("grpc.use_local_subchannel_pool", 1),
        # Often enough to notice a dead peer within two minutes, rare enough for any server to tolerate.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # gRPC pings of its own accord, too, to measure; what waits for such a ping's answer waits for no other.
        ("grpc.http2.ping_timeout_ms", 20_000),
    )


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    token = token or os.environ.get(TOKEN_VARIABLE)
    return (("authorization", f"Bearer {token}"),) if token else ()


@dataclass(frozen=True, slots=True)
class Certificates:
    """Whom to trust, and what to show: paths of PEM files, empty for none. `ca` may be "system"."""

    ca: str = ""
    client_cert: str = ""
    client_key: str = ""

    @classmethod
    def of(cls, ca: PathName, client_cert: PathName, client_key: PathName) -> Certificates:
        """Fills in what was left out from the environment."""
        given = ((ca, CA_VARIABLE), (client_cert, CLIENT_CERT_VARIABLE), (client_key, CLIENT_KEY_VARIABLE))
        return cls(*(os.fspath(path) if path else os.environ.get(variable, "") for path, variable in given))

    def credentials(self) -> grpc.ChannelCredentials | None:
        """None where nothing asks for TLS. Raises InvalidFieldError for files that cannot be used."""
        if bool(self.client_cert) != bool(self.client_key):
            raise InvalidFieldError.of("client_cert", "it and client_key belong together.", hint="Give both.")
        if self == Certificates():
            return None
        ca = "" if self.ca == SYSTEM_CA else self.ca
        return grpc.ssl_channel_credentials(
            _read(ca, "ca"), _read(self.client_key, "client_key"), _read(self.client_cert, "client_cert")
        )


def _read(path: str, field: str) -> bytes | None:
    try:
        return Path(path).expanduser().read_bytes() if path else None
    except OSError as error:
        raise InvalidFieldError.of(field, f"{path} cannot be read: {error.strerror}.") from None


def check_size(request: Message, max_message_bytes: int) -> None:
    """Refuses a request that gRPC would only refuse after copying all of it."""
    if (size := request.ByteSize()) > max_message_bytes:
        raise MessageTooLargeError(
            f"The request takes {size:,} bytes, and this client sends at most {max_message_bytes:,}.",
            hint="Send smaller or fewer images, or raise max_message_bytes here and in the daemon.",
        )


def failure(error: BaseException, target: str) -> BaseException:
    """What to raise in place of an exception of gRPC."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        if task is None or task.cancelling():
            return error
        # grpc.aio says so as well when the call was cancelled and the task was not: its client was closed.
        return DenoisedError("The call was cancelled.")
    call: Any = error
    return status.from_call(call.code(), call.details(), call.trailing_metadata(), target=target)

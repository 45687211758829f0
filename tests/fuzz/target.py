"""A daemon under fuzz: what is sent to it, and what must hold afterwards."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import psutil
from denoised.status import DETAILS_KEY
from denoised.v1 import pipeline_service_pb2, worker_service_pb2
from denoised_server import tokens
from denoised_server.callers import Quota, Scope
from denoised_server.services import SERVICES
from denoised_server.tokens import Token
from google.protobuf import descriptor_pool
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2

from tests.daemon import Daemon
from tests.reasons import documented

METHODS = {
    f"/{service}/{method.name}": method
    for service in SERVICES
    for method in descriptor_pool.Default().FindServiceByName(service).methods
}
DOCUMENTED = documented()
PING_EVERY = 20
# Longer than any refusal takes on a machine that is busy with other things; what it did take is reported.
PATIENCE = 30.0
VICTIM = "pipelines/victim"
# Enough to see that a generation or a watch has begun.
EVENTS = 3


class Target:
    """A daemon with a pipeline that the fuzz may use, and another client's that it must not be able to harm."""

    def __init__(self, state_dir: Path, checkpoint: Path) -> None:
        file = state_dir / "tokens.json"
        usual = frozenset(Scope) - {Scope.ADMIN}
        quota = Quota(pipelines=20)
        tokens.write(
            file,
            [
                Token("fuzz", usual, tokens.digest("fuzz"), quota=quota),
                Token("witness", usual, tokens.digest("witness")),
                Token("root", frozenset({Scope.ADMIN}), tokens.digest("root")),
            ],
        )
        config = state_dir / "denoised.toml"
        config.write_text("max_pixels = 4096\nmax_message_bytes = 1048576\n")
        options = ("--tokens-file", str(file), "--config", str(config))
        self.daemon = Daemon(state_dir, *options, allow=[checkpoint.parent])
        self.checkpoint = checkpoint
        self.channel = grpc.insecure_channel(self.daemon.target)
        self.root = self.daemon.client(token="root")
        self._witness_client = self.daemon.client(token="witness")
        self._fuzz_client = self.daemon.client(token="fuzz")
        self._witness = self._witness_client.load(checkpoint, task="text-to-image", pipeline_id="witness")
        self.outcomes = Counter[str]()
        # Seconds, and how the call ended.
        self.refusals: list[tuple[float, str]] = []
        # Seconds of calls that ask for next to nothing, in between: how busy the machine is with other things.
        self.pings: list[float] = []
        self._good = self._picture()
        self._bring_victim_back()
        self._process_bytes = self._memory()

    def close(self) -> None:
        for client in (self.root, self._witness_client, self._fuzz_client):
            client.close()
        self.channel.close()
        self.daemon.stop()

    def send(self, path: str, requests: Iterable[bytes], token: str = "fuzz") -> None:
        """One call with these bytes, to where it is refused or has begun; checks how it was refused."""
        method = METHODS[path]
        answer = GetMessageClass(method.output_type).FromString
        kinds = {
            (False, False): self.channel.unary_unary,
            (False, True): self.channel.unary_stream,
            (True, False): self.channel.stream_unary,
            (True, True): self.channel.stream_stream,
        }
        make: Any = kinds[method.client_streaming, method.server_streaming]
        call = make(path, request_serializer=None, response_deserializer=answer)
        given = iter(list(requests)) if method.client_streaming else next(iter(requests))
        metadata = (("authorization", f"Bearer {token}"),)
        if not sum(self.outcomes.values()) % PING_EVERY:
            self._ping()
        began = time.monotonic()
        try:
            if method.server_streaming:
                self._read(call(given, timeout=PATIENCE, metadata=metadata))
            else:
                self._let_go(call(given, timeout=PATIENCE, metadata=metadata))
        except grpc.RpcError as error:
            took, (code, reason) = time.monotonic() - began, _refusal(error)
            assert reason in DOCUMENTED[method.name], f"{method.name} does not say that it may end with {reason}"
            outcome = f"{method.name} {code} {reason}"
            self.refusals.append((took, outcome))
            self.outcomes[outcome] += 1
        else:
            self.outcomes[f"{method.name} ok"] += 1

    def check(self) -> None:
        """The daemon is as it was, and so is what it makes for others."""
        assert self.daemon.process.poll() is None
        (worker,) = self.root.workers()
        assert worker.restart_count == 0
        assert self._picture() == self._good, "the same request gives the same bits"
        self._bring_victim_back()

    def check_end(self) -> None:
        """And nothing is left of what was sent."""
        self.check()
        for pipeline in self.root.pipelines():
            if pipeline.name not in (VICTIM, self._witness.name):
                self.root.unload(pipeline.name, force=True)
        (worker,) = self.root.workers()
        assert (worker.running_count, worker.waiting_count) == (0, 0)
        assert len(self.root.pipelines()) == 2
        assert worker.memory.weight_bytes == self._witness.info.exclusive_bytes
        log = "".join(self.daemon.log)
        assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:5000]

    @property
    def grown_bytes(self) -> int:
        """Memory of its processes, beyond what they had before."""
        return self._memory() - self._process_bytes

    def _ping(self) -> None:
        began = time.monotonic()
        self.root.server_info()
        self.pings.append(time.monotonic() - began)

    def _memory(self) -> int:
        pids = [self.daemon.process.pid, *(worker.pid for worker in self.root.workers())]
        return sum(psutil.Process(pid).memory_info().rss for pid in pids)

    def _picture(self) -> bytes:
        made = self._witness("a cat", num_inference_steps=2, height=64, width=64, seed=1, batching="forbid")
        pixels: bytes = made.images[0].tobytes()
        return pixels

    def _bring_victim_back(self) -> None:
        # Under the same id it is the one that is there, unless the fuzz has replaced it.
        with contextlib.suppress(LookupError):
            self._fuzz_client.unload(VICTIM, force=True)
        self._fuzz_client.load(self.checkpoint, task="text-to-image", pipeline_id=VICTIM.partition("/")[2])

    def _read(self, call: Any) -> None:
        for count, response in enumerate(call, 1):
            self._let_go(response)
            # A load is read to its end, so that what it made can be let go of; a watch has none, and may be silent.
            is_load = isinstance(response, pipeline_service_pb2.LoadPipelineResponse)
            is_synced = getattr(response, "change", None) == pipeline_service_pb2.WatchPipelinesResponse.CHANGE_SYNCED
            is_worker = isinstance(response, worker_service_pb2.WatchWorkersResponse)
            if is_synced or is_worker or (count >= EVENTS and not is_load):
                call.cancel()
                return

    def _let_go(self, response: Any) -> None:
        made = getattr(response, "pipeline", None)
        is_new = isinstance(
            response, pipeline_service_pb2.LoadPipelineResponse | pipeline_service_pb2.DerivePipelineResponse
        )
        if is_new and made is not None and made.name and made.name != VICTIM:
            self._fuzz_client.unload(made.name)


def _refusal(error: Any) -> tuple[str, str]:
    """Code and reason of a refusal, which is no bug."""
    code = error.code().name
    details = dict(error.trailing_metadata() or ()).get(DETAILS_KEY)
    assert details is not None, f"{code}: {error.details()} has no details"
    status, info = status_pb2.Status.FromString(details), error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    assert info.domain == "denoised"
    assert info.reason != "INTERNAL", error.details()
    assert "Traceback" not in error.details()
    return code, info.reason

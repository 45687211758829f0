"""Servers under test: ours, diffusers in this process, and those that people use instead.

Each draws the same pictures from the same checkpoint with one compute thread. Those of `peers/` run in virtual
environments of their own, which `make peers` makes; one whose environment is not there is left out.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import denoised
import grpc
import psutil
from denoised import media
from denoised.v1 import generation_service_pb2
from denoised.values import artifact_to_proto
from google.protobuf.wrappers_pb2 import BytesValue
from PIL import Image

from tests.benchmarks.asks import TASKS, Ask
from tests.benchmarks.peers.pictures import SIZE, Pictures
from tests.daemon import Daemon

ENVIRONMENTS = Path(__file__).parents[2] / ".venv-peers"
START_SECONDS = 180.0
PAUSE = 0.05


class CallerLeftError(Exception):
    """The caller went away before its picture was there."""


class Server(Protocol):
    """One server, ready to draw."""

    def draw(self, ask: Ask, timeout: float | None = None) -> bytes:
        """One PNG. Leaves the call after `timeout` seconds, with CallerLeftError. May be called from many threads."""

    def processes(self) -> list[psutil.Process]:
        """All that it consists of; none where it is part of this process."""


class Locked:
    """diffusers in this process, under a lock: the floor."""

    def __init__(self, folder: Path) -> None:
        self._pictures, self._lock = Pictures(str(folder)), threading.Lock()

    def draw(self, ask: Ask, timeout: float | None = None) -> bytes:
        with self._lock:
            return self._pictures.draw([ask.to_json()])[0]

    def processes(self) -> list[psutil.Process]:
        return []


class Denoised:
    """This project: `denoised serve`, one handle for each task, all derived from one."""

    def __init__(self, daemon: Daemon, folder: Path) -> None:
        self._daemon = daemon
        self._client = daemon.client(timeout=None)
        loaded = denoised.AutoPipelineForText2Image.from_pretrained(folder, client=self._client, ttl="1d")
        self._names = {loaded.task: loaded.name}
        for task in TASKS[1:]:
            self._names[task] = self._client.derive(loaded, task, ttl="1d").name
        picture, mask = Image.new("RGB", (SIZE, SIZE), (200, 80, 20)), Image.new("L", (SIZE, SIZE), 255)
        self._picture = artifact_to_proto(media.pack_image(picture, "image/png"))
        self._mask = artifact_to_proto(media.pack_image(mask, "image/png"))

    def draw(self, ask: Ask, timeout: float | None = None) -> bytes:
        request = generation_service_pb2.GenerateRequest(pipeline=self._names[ask.task], prompt="red apple")
        request.sampling.num_inference_steps = ask.steps
        request.sampling.seeds.append(ask.seed)
        request.noise_scheduler.class_name = ask.scheduler
        # As the SDK asks; the others tell nothing.
        request.progress_interval.FromMilliseconds(100)
        if ask.task != "text-to-image":
            request.image.CopyFrom(self._picture)
            request.sampling.strength = 1.0
        if ask.task == "inpainting":
            request.mask_image.CopyFrom(self._mask)
        if ask.task != "image-to-image":
            request.sampling.height = request.sampling.width = SIZE
        try:
            (picture,) = [
                event.output.artifact.data
                for event in self._client.generate(request, timeout=timeout)
                if event.HasField("output")
            ]
        except denoised.DeadlineExceededError:
            raise CallerLeftError from None
        return picture

    def processes(self) -> list[psutil.Process]:
        daemon = psutil.Process(self._daemon.process.pid)
        return [daemon, *daemon.children(recursive=True)]


class Grpc:
    """One method over gRPC, from bytes to bytes."""

    def __init__(
        self, process: psutil.Process, port: int, method: str, pack: Callable[[bytes], bytes], unpack: Any
    ) -> None:
        self._process = process
        self._call = grpc.insecure_channel(f"127.0.0.1:{port}").unary_unary(
            method, request_serializer=pack, response_deserializer=unpack
        )

    def draw(self, ask: Ask, timeout: float | None = None) -> bytes:
        try:
            picture: bytes = self._call(ask.to_json().encode(), timeout=timeout, wait_for_ready=True)
        except grpc.RpcError as error:
            code: Any = error
            if code.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise CallerLeftError from None
            raise
        return picture

    def processes(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)]


class Http:
    """One path over HTTP, JSON in; a connection for each call, on one machine a fraction of a millisecond."""

    def __init__(
        self, process: psutil.Process, port: int, path: str, ask: Callable[[str], object], picture: Any
    ) -> None:
        self._process, self._port, self._path, self._ask, self._picture = process, port, path, ask, picture

    def draw(self, ask: Ask, timeout: float | None = None) -> bytes:
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=timeout)) as connection:
            body = json.dumps(self._ask(ask.to_json()))
            try:
                connection.request("POST", self._path, body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                data = response.read()
            except TimeoutError:
                raise CallerLeftError from None
        if response.status != http.HTTPStatus.OK:
            raise OSError(f"{self._path} answered {response.status}: {data[:200]!r}")
        return bytes(self._picture(data))

    def processes(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)]


def _triton_ask(ask: str) -> object:
    return {"inputs": [{"name": "ask", "datatype": "BYTES", "shape": [1, 1], "data": [ask]}]}


def _triton_picture(data: bytes) -> bytes:
    return base64.b64decode(json.loads(data)["outputs"][0]["data"][0])


def _bentoml(data: bytes) -> bytes:
    return base64.b64decode(json.loads(data)[0])


# Module in peers/, how to talk to it, and the environment it needs; none is this one's own.
PEERS: dict[str, tuple[str, Callable[[psutil.Process, int], Server], str]] = {
    "naive gRPC, a lock": (
        "naive",
        lambda process, port: Grpc(process, port, "/peers.Pictures/Draw", bytes, bytes),
        "",
    ),
    "LitServe": (
        "litserve",
        lambda process, port: Http(process, port, "/predict", lambda ask: {"ask": ask}, bytes),
        "litserve",
    ),
    "BentoML": (
        "bentoml",
        lambda process, port: Http(process, port, "/draw", lambda ask: {"asks": [ask]}, _bentoml),
        "bentoml",
    ),
    "PyTriton": (
        "pytriton",
        lambda process, port: Http(process, port, "/v2/models/pictures/infer", _triton_ask, _triton_picture),
        "pytriton",
    ),
    "Ray Serve, gRPC": (
        "ray_serve",
        lambda process, port: Grpc(
            process,
            port,
            "/peers.Pictures/draw",
            lambda ask: BytesValue(value=ask).SerializeToString(),
            lambda data: BytesValue.FromString(data).value,
        ),
        "ray",
    ),
}


def present() -> list[str]:
    """Names of those that can be started here, ours and the floor first."""
    return ["in-process, a lock", "denoised", *(name for name in PEERS if _python(name) is not None)]


@contextmanager
def start(name: str, folder: Path, state: Path) -> Iterator[Server]:
    """Starts a server and draws one picture; all its processes have ended when this is left."""
    if name == "in-process, a lock":
        yield Locked(folder)
        return
    if name == "denoised":
        with Daemon(state, allow=[folder], threads=1) as daemon:
            yield Denoised(daemon, folder)
        return
    module, connect, _ = PEERS[name]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [str(_python(name)), "-m", f"tests.benchmarks.peers.{module}", str(folder), str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        server = connect(psutil.Process(process.pid), port)
        _wait(server, process)
        yield server
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        os.killpg(process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs([*children, psutil.Process(process.pid)], timeout=10)
        for one in alive:
            one.kill()
        process.wait()


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            server.draw(Ask(1))
            return
        except (OSError, grpc.RpcError):
            if time.monotonic() > end or process.poll() is not None:
                raise
            time.sleep(PAUSE)


def _python(name: str) -> Path | None:
    environment = PEERS[name][2]
    python = ENVIRONMENTS / environment / "bin" / "python"
    if not environment:
        return Path(sys.executable)
    return python if python.exists() else None

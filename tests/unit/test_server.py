"""The daemon as a process, with workers that need no torch."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from denoised.v1 import generation_service_pb2, pipeline_service_pb2
from denoised.v1.generation_service_pb2_grpc import GenerationServiceStub
from denoised.v1.pipeline_service_pb2_grpc import PipelineServiceStub
from denoised_server import server
from denoised_server.services import SERVICES
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

PROGRAM = """
import sys
from denoised_server.server import main
overrides = {"device": "cpu", "address": "127.0.0.1:0", "metrics_address": "127.0.0.1:0"}
overrides |= dict(argument.split("=") for argument in sys.argv[1:])
if __name__ == "__main__":
    code = main(overrides, config_file=None, print_config=False, verbose=False,
                worker="tests.contract.toy_worker:ToyWorker")
    sys.exit(code)
"""


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@contextmanager
def daemon(tmp_path: Path, *settings: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A running daemon: its process, its address and the address of its metrics."""
    process = start(tmp_path, *settings)
    assert process.stdout
    assert process.stderr
    try:
        found = re.fullmatch(r"denoised ready on (\S+), metrics on (\S+)\n", process.stdout.readline())
        assert found, process.stderr.read()
        # Read, so that the daemon never has to wait for us.
        reader = threading.Thread(target=process.stderr.read)
        reader.start()
        yield process, found[1], found[2]
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()
        process.stderr.close()


def start(tmp_path: Path, *settings: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, f"state_dir={tmp_path}", *settings]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def load(channel: grpc.Channel) -> str:
    spec = pipeline_service_pb2.PipelineSpec(repo_id="weights")
    responses = PipelineServiceStub(channel).LoadPipeline(pipeline_service_pb2.LoadPipelineRequest(spec=spec))
    name: str = [*responses][-1].pipeline.name
    return name


def generate(channel: grpc.Channel, pipeline: str, prompt: str = "a cat", steps: int = 3) -> Any:
    request = generation_service_pb2.GenerateRequest(
        pipeline=pipeline, prompt=prompt, sampling=generation_service_pb2.Sampling(num_inference_steps=steps)
    )
    return GenerationServiceStub(channel).Generate(request)


def health(channel: grpc.Channel, service: str) -> int:
    status: int = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service)).status
    return status


def test_it_answers_health_reflection_and_metrics(tmp_path: Path) -> None:
    with daemon(tmp_path, "workers=2") as (_, address, metrics), grpc.insecure_channel(address) as channel:
        for service in ("", *SERVICES):
            assert health(channel, service) == health_pb2.HealthCheckResponse.SERVING
        assert set(SERVICES) <= set(ProtoReflectionDescriptorDatabase(channel).get_services())
        list(generate(channel, load(channel)))
        with urllib.request.urlopen(metrics, timeout=10) as response:
            text = response.read().decode()
        assert 'denoised_requests_total{method="Generate",outcome="ok"} 1.0' in text
        assert 'denoised_images_total{model="weights"} 1.0' in text


def test_on_sigterm_it_finishes_what_runs_and_exits_with_zero(tmp_path: Path) -> None:
    with daemon(tmp_path) as (process, address, _), grpc.insecure_channel(address) as channel:
        name = load(channel)
        running = generate(channel, name, steps=300)
        next(running)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        events = list(running)
        assert events[-1].WhichOneof("event") == "summary"
        assert process.wait(timeout=20) == 0
        assert psutil.wait_procs(workers, timeout=10)[1] == []


def test_the_grace_is_a_setting_and_a_second_signal_needs_none(tmp_path: Path) -> None:
    with daemon(tmp_path, "drain_grace=0.1") as (process, address, _), grpc.insecure_channel(address) as channel:
        running = generate(channel, load(channel), "hang")
        next(running)
        process.send_signal(signal.SIGINT)
        with pytest.raises(grpc.RpcError) as caught:
            list(running)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert process.wait(timeout=20) == 0
    with daemon(tmp_path, "drain_grace=60") as (process, address, _), grpc.insecure_channel(address) as channel:
        running = generate(channel, load(channel), "hang")
        next(running)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        while health(channel, "") == health_pb2.HealthCheckResponse.SERVING:
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 128 + signal.SIGTERM
        assert psutil.wait_procs(workers, timeout=10)[1] == []
        running.cancel()


def test_workers_end_with_a_daemon_that_is_killed(tmp_path: Path) -> None:
    with daemon(tmp_path, "workers=2") as (process, _, _):
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        process.kill()
        assert psutil.wait_procs(workers, timeout=10)[1] == []


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_an_address_may_be_one_of_ipv6(tmp_path: Path) -> None:
    with daemon(tmp_path, "address=[::1]:0") as (_, address, _), grpc.insecure_channel(address) as channel:
        assert address.startswith("[::1]:")
        grpc.channel_ready_future(channel).result(timeout=10)


@pytest.mark.parametrize("setting", ["address", "metrics_address"])
def test_a_port_in_use_is_one_sentence_and_no_worker_is_started(
    tmp_path: Path, setting: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        given = {"address": "127.0.0.1:0", "metrics_address": "127.0.0.1:0", "device": "cpu", "state_dir": tmp_path}
        code = server.main(
            given | {setting: address}, config_file=None, print_config=False, verbose=False, worker="no.such:Worker"
        )
    assert code == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err == f"denoised: {setting} {address} cannot be listened on: it is in use; another daemon may be running.\n"


def test_workers_that_cannot_start_end_the_daemon_with_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = {"address": "127.0.0.1:0", "metrics_address": "127.0.0.1:0", "device": "cpu", "state_dir": tmp_path}
    code = server.main(given, config_file=None, print_config=False, verbose=False, worker="no.such:Worker")
    assert code == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("denoised: workers/0 ended with exit code 1.")


def test_settings_that_cannot_be_used_are_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    for given in ({"max_runing": 1}, {"workers": 0}, {"device": "gpu"}):
        assert server.main(given, config_file=None, print_config=False, verbose=False) == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 3
    assert all(error.startswith("denoised: ") for error in errors)
    assert "did you mean max_running?" in errors[0]


def test_the_configuration_can_be_printed(capfd: pytest.CaptureFixture[str]) -> None:
    assert server.main({"max_running": 7}, config_file=None, print_config=True, verbose=False) == 0
    assert "\nmax_running = 7\n" in capfd.readouterr().out

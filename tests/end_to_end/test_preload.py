"""A daemon that is ready when its declared pipelines are, and says so to probes of either kind."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from denoised import Client
from denoised.v1.generation_service_pb2 import GenerateRequest

from tests.daemon import Daemon
from tests.faults.victim import Victim


def probe(metrics_url: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(metrics_url.replace("/metrics", path), timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_declared_pipeline_is_there_from_the_first_moment_and_has_generated(tmp_path: Path) -> None:
    declared = "demo,id=painter,task=text-to-image"
    with Daemon(tmp_path, "--preload", declared, "--readiness-probe", "generate") as daemon:
        assert probe(daemon.metrics_url, "/readyz") == (200, "ready\n")
        assert daemon.metric("denoised_images_total") >= 1
        with daemon.client() as client:
            (pipe,) = client.pipelines()
            assert (pipe.name, pipe.info.pinned) == ("pipelines/painter", True)
            assert pipe("red apple", num_inference_steps=2).images
        (worker,) = daemon.workers()
        worker.kill()
        while probe(daemon.metrics_url, "/readyz")[0] == 200:
            time.sleep(0.02)
        while probe(daemon.metrics_url, "/readyz") != (200, "ready\n"):
            time.sleep(0.1)


def test_while_a_pipeline_is_being_loaded_the_daemon_is_starting_and_serves_those_who_wait(tmp_path: Path) -> None:
    victim = Victim(tmp_path, preload="slow,id=painter")
    victim.launch()
    try:
        with victim.client() as client:
            while not _answers(client):
                time.sleep(0.02)
            url = f"http://{victim.metrics}/metrics"
            assert not client.is_serving()
            assert [probe(url, path)[0] for path in ("/healthz", "/readyz", "/startupz")] == [200, 503, 503]
            assert probe(url, "/readyz")[1] == "starting\npipelines/painter is not ready.\n"
            while "pipelines/painter" not in [pipe.name for pipe in client.pipelines()]:
                time.sleep(0.02)
            request = GenerateRequest(pipeline="pipelines/painter", prompt="a cat")
            assert any(event.HasField("summary") for event in client.generate(request))
            assert client.is_serving()
            assert probe(url, "/readyz") == (200, "ready\n")
    finally:
        victim.kill()


def test_what_cannot_be_loaded_ends_the_daemon_with_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "denoised", "serve", "--state-dir", str(tmp_path), "--device", "cpu"]
    command += ["--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0", "--preload", f"{tmp_path}/none,id=a"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert "pipelines/a" in done.stderr
    assert "Traceback" not in done.stderr


def _answers(client: Client) -> bool:
    try:
        client.is_serving(timeout=1)
    except ConnectionError:
        return False
    return True

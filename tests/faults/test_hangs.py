"""Workers that hang: noticed, replaced, and their generations go on."""

from __future__ import annotations

import signal
import urllib.error
import urllib.request
from pathlib import Path

from denoised.v1.generation_service_pb2 import GenerateRequest

from tests.faults.victim import Victim


def probe(victim: Victim, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{victim.metrics}{path}", timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_stopped_worker_is_replaced_and_the_stream_goes_on(tmp_path: Path) -> None:
    with Victim(tmp_path, heartbeat_timeout=2) as victim, victim.client() as client:
        assert probe(victim, "/readyz") == (200, "ready\n")
        client.load("weights", pipeline_id="a")
        (worker,) = victim.workers()
        request = GenerateRequest(pipeline="pipelines/a", prompt="a cat")
        request.sampling.num_inference_steps = 300
        steps = []
        for event in client.generate(request):
            if event.HasField("progress"):
                steps.append(event.progress.completed_steps)
                if len(steps) == 50:
                    worker.send_signal(signal.SIGSTOP)
        assert steps == list(range(1, 301))
        assert event.summary.replay_count == 1
        assert not worker.is_running()
        assert [probe(victim, path)[0] for path in ("/healthz", "/readyz", "/startupz")] == [200, 200, 200]
        assert "denoised_requests_total" in probe(victim, "/metrics")[1]

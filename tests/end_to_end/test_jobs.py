"""Generations that outlive connections, callers and the daemon, with the real worker."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import denoised
import numpy as np
import pytest
from denoised import errors
from denoised.v1.generation_service_pb2 import GenerateRequest
from denoised_server.executor.local import WORKER
from PIL import Image

from tests.faults.victim import Victim

STEPS = 120
ARGUMENTS: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": STEPS, "seed": 5, "batching": "forbid"}


@pytest.fixture
def victim(tmp_path: Path, checkpoint_dir: Path) -> Iterator[Victim]:
    with Victim(tmp_path, worker=WORKER, allow_dirs=checkpoint_dir) as victim:
        yield victim


def test_a_job_and_a_call_survive_the_daemon(victim: Victim, sd_checkpoint: Path, tmp_path: Path) -> None:
    with victim.client(timeout=None) as client:
        pipe = denoised.AutoPipelineForText2Image.from_pretrained(sd_checkpoint, client=client)
        expected = np.asarray(pipe("a cat", **ARGUMENTS).images[0])
        job = pipe.submit("a cat", **ARGUMENTS)
        assert job.name in {one.name for one in client.generations()}
        assert (
            pipe.submit("a cat", request_id="r1", **ARGUMENTS).name
            == pipe.submit("a cat", request_id="r1", **ARGUMENTS).name
        )
        results: list[Any] = []
        steps: list[int] = []

        def told(pipe: object, step: int, timestep: object, tensors: object) -> dict[str, Any]:
            steps.append(step)
            if step == 10:
                threading.Thread(target=restart).start()
            return {}

        def restart() -> None:
            victim.kill()
            victim.start()

        results.append(
            pipe("a cat", callback_on_step_end=told, callback_on_step_end_tensor_inputs=[], **ARGUMENTS).images[0]
        )
        results.append(job.result().images[0])
        results.append(client.generation(job.name).result().images[0])
        assert steps == list(range(STEPS)), "each step once"
        for picture in results:
            np.testing.assert_array_equal(np.asarray(picture), expected)
        assert job.refresh().state == "succeeded"

        def run(*arguments: str) -> str:
            command = [sys.executable, "-m", "denoised", *arguments, "--target", victim.target]
            return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

        name = run("generate", pipe.name, "--prompt", "a cat", "--steps", "900", "--detach").strip()
        assert name in run("generations")
        assert "cancelled" in run("cancel", name)
        with pytest.raises(errors.GenerationCancelledError):
            client.generation(name).result()
        run("result", job.name, "-o", str(tmp_path / "cat.png"))
        with Image.open(tmp_path / "cat.png") as picture:
            assert picture.size == (64, 64)


def test_a_daemon_that_is_not_there_is_told_at_once() -> None:
    with denoised.Client("127.0.0.1:1", progress_bar=False) as client, pytest.raises(errors.DaemonUnreachableError):
        list(client.generate(GenerateRequest(pipeline="pipelines/a")))

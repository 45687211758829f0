"""Memory that a worker loses: it is started anew when it has nothing to do, and nobody has to know."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from denoised.v1 import worker_service_pb2 as pb

from tests.faults.faulty import LEAK, LEAKING, LEAKY
from tests.faults.test_hangs import probe
from tests.faults.victim import Victim

SIZE: dict[str, Any] = {"height": 64, "width": 64, "output_type": "np"}


def until(predicate: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not predicate():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_a_worker_that_loses_memory_is_started_anew_once_it_is_idle_and_handles_stay(
    tmp_path: Path, sd_checkpoint: Path
) -> None:
    victim = Victim(tmp_path, worker=LEAKY, leak_limit=LEAK // 2, allow_dirs=sd_checkpoint.parent)
    with victim, victim.client() as client:

        def is_active() -> bool:
            return client.workers()[0].state == pb.Worker.STATE_ACTIVE

        pipe = client.load(sd_checkpoint, task="text-to-image", pinned=True)
        expected = pipe("a cat", seed=1, batching="forbid", num_inference_steps=2, **SIZE).images
        (worker,) = victim.workers()
        # Longer than it takes to be noticed: nothing is ended for it.
        job = pipe.submit("a cat", seed=1, num_inference_steps=500, **SIZE)
        worker.send_signal(LEAKING)
        job.result()
        assert worker.is_running()
        until(lambda: not worker.is_running())
        until(is_active)
        assert client.workers()[0].memory.unaccounted_bytes < LEAK // 2
        # It is pinned: nobody has to use it for it to come back.
        until(lambda: bool(pipe.refresh().info.worker))
        images = pipe("a cat", seed=1, batching="forbid", num_inference_steps=2, **SIZE).images
        np.testing.assert_array_equal(images, expected)
        assert client.workers()[0].restart_count == 1
        assert 'denoised_worker_recycles_total{worker="workers/0"} 1.0' in probe(victim, "/metrics")[1]
        assert any("in no book, and is started anew" in line for line in victim.log)

"""What a Generate call costs over calling the same pipeline in this process.

One request at a time, raw output, both sides with one compute thread, in turns of a few calls each: whoever has just
been idle finds the caches cold, which is not the cost of a call. A tiny random checkpoint, and the demo model, where
the noise of a shared machine is larger than the cost.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import denoised
import diffusers
import torch
from denoised_server.demo import CHECKPOINT

from tests import checkpoints
from tests.benchmarks import setting
from tests.daemon import Daemon

ROUNDS, TURN = 12, 6


def compare(daemon: Daemon, name: str, folder: Path, steps: int) -> None:
    local = diffusers.AutoPipelineForText2Image.from_pretrained(folder, torch_dtype=torch.float32)
    local.set_progress_bar_config(disable=True)
    with (
        daemon.client() as client,
        denoised.AutoPipelineForText2Image.from_pretrained(folder, client=client) as remote,
    ):

        def call(pipe: Callable[..., object]) -> float:
            arguments = {"num_inference_steps": steps, "output_type": "np", "height": 64, "width": 64}
            return setting.seconds(lambda: pipe("red apple", **arguments))

        turns = [[[call(pipe) for _ in range(TURN)][1:] for pipe in (local, remote)] for _ in range(ROUNDS + 1)][1:]
    inside, outside = ([seconds for turn in turns for seconds in turn[side]] for side in (0, 1))
    here, there = statistics.median(inside), statistics.median(outside)
    print(f"{name:6} {steps:2} steps: in-process {setting.spread(inside)}, daemon {setting.spread(outside)}")
    print(f"                 {(there - here) * 1e3:+.2f} ms, x{there / here:.3f}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tiny = checkpoints.stable_diffusion(Path(folder) / "sd")
        with setting.daemon(allow=[tiny]) as daemon:
            for steps in (4, 20):
                compare(daemon, "tiny", tiny, steps)
            compare(daemon, "demo", CHECKPOINT, 4)


if __name__ == "__main__":
    main()

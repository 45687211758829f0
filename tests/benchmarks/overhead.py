"""What a Generate call costs over calling the same pipeline in this process.

One request at a time, raw output, both sides with one compute thread, in turns of a few calls each: whoever has just
been idle finds the caches cold, which is not the cost of a call. Where its weights lie makes a process faster or slower
by some percent for as long as it lives, so there are several of each. A tiny random checkpoint, and the demo model,
where the noise of a shared machine is larger than the cost.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import denoised
import diffusers
import torch
from denoised_server.demo import CHECKPOINT

from tests import checkpoints
from tests.benchmarks import setting

PROCESSES, ROUNDS, TURN = 3, 5, 6


def main() -> None:
    if len(sys.argv) == 4:
        measure(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
        return
    with tempfile.TemporaryDirectory() as folder:
        tiny = checkpoints.stable_diffusion(Path(folder) / "sd")
        for name, checkpoint, steps in (("tiny", tiny, 4), ("tiny", tiny, 20), ("demo", CHECKPOINT, 4)):
            for _ in range(PROCESSES):
                command = [sys.executable, "-m", "tests.benchmarks.overhead", str(checkpoint), name, str(steps)]
                subprocess.run(command, check=True)


def measure(folder: Path, name: str, steps: int) -> None:
    local = diffusers.AutoPipelineForText2Image.from_pretrained(folder, torch_dtype=torch.float32)
    local.set_progress_bar_config(disable=True)
    with (
        setting.daemon(allow=[folder]) as daemon,
        daemon.client() as client,
        denoised.AutoPipelineForText2Image.from_pretrained(folder, client=client) as remote,
    ):
        remote.set_progress_bar_config(disable=True)

        def call(pipe: Callable[..., object]) -> float:
            arguments = {"num_inference_steps": steps, "output_type": "np", "height": 64, "width": 64}
            return setting.seconds(lambda: pipe("red apple", **arguments))

        turns = [[[call(pipe) for _ in range(TURN)][1:] for pipe in (local, remote)] for _ in range(ROUNDS + 1)][1:]
    inside, outside = ([seconds for turn in turns for seconds in turn[side]] for side in (0, 1))
    here, there = statistics.median(inside), statistics.median(outside)
    print(
        f"{name} {steps:2} steps: in-process {setting.spread(inside)}, daemon {setting.spread(outside)}: "
        f"{(there - here) * 1e3:+.2f} ms, x{there / here:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()

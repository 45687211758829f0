"""What a Generate call costs over calling the same pipeline in this process.

One request at a time, 4 steps, raw output, both sides with one compute thread, in turns: a tiny random checkpoint, and
the demo model, where the noise of a shared machine is larger than the cost.
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

ROUNDS, WARM_UP, STEPS = 100, 10, 4


def compare(daemon: Daemon, name: str, folder: Path) -> None:
    local = diffusers.AutoPipelineForText2Image.from_pretrained(folder, torch_dtype=torch.float32)
    local.set_progress_bar_config(disable=True)
    with (
        daemon.client() as client,
        denoised.AutoPipelineForText2Image.from_pretrained(folder, client=client) as remote,
    ):

        def call(pipe: Callable[..., object]) -> float:
            arguments = {"num_inference_steps": STEPS, "output_type": "np", "height": 64, "width": 64}
            return setting.seconds(lambda: pipe("red apple", **arguments))

        pairs = [(call(local), call(remote)) for _ in range(ROUNDS + WARM_UP)][WARM_UP:]
    inside, outside = zip(*pairs, strict=True)
    paired = statistics.median(there - here for here, there in pairs)
    print(f"{name:6} in-process {setting.spread(inside)}, daemon {setting.spread(outside)}")
    print(
        f"       {paired * 1e3:+.2f} ms median of pairs, x{statistics.median(outside) / statistics.median(inside):.3f}"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tiny = checkpoints.stable_diffusion(Path(folder) / "sd")
        with setting.daemon(allow=[tiny]) as daemon:
            compare(daemon, "tiny", tiny)
            compare(daemon, "demo", CHECKPOINT)


if __name__ == "__main__":
    main()

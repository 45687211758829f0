"""What a Generate call costs over calling the same pipeline in this process.

One request at a time, 4 steps of the demo model, raw output, both sides with one compute thread, in turns.
"""

from __future__ import annotations

import statistics

import denoised
import diffusers
import torch
from denoised_server.demo import CHECKPOINT

from tests.benchmarks import setting

ROUNDS, STEPS = 60, 4


def main() -> None:
    local = diffusers.AutoPipelineForText2Image.from_pretrained(CHECKPOINT, torch_dtype=torch.float32)
    local.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": STEPS, "output_type": "np"}
    with setting.daemon() as daemon, daemon.client() as client:
        remote = denoised.AutoPipelineForText2Image.from_pretrained("demo", client=client)
        times: dict[str, list[float]] = {"in-process": [], "daemon": []}
        for round_ in range(ROUNDS + 5):
            for name, pipe in (("in-process", local), ("daemon", remote)):
                took = setting.seconds(lambda pipe=pipe: pipe("red apple", **arguments))  # type: ignore[misc]
                if round_ >= 5:
                    times[name].append(took)
    for name, values in times.items():
        print(f"{name:12} {setting.spread(values)}")
    inside, outside = (statistics.median(values) for values in times.values())
    paired = statistics.median(b - a for a, b in zip(*times.values(), strict=True))
    print(f"overhead     {(outside - inside) * 1e3:+.2f} ms of medians, {paired * 1e3:+.2f} ms median of pairs")
    print(f"ratio        {outside / inside:.3f}")


if __name__ == "__main__":
    main()

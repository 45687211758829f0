"""What a preview takes of the engine's thread, and in all, for latents of the usual families at 1024²."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from denoised_server.messages import PreviewOptions
from denoised_server.worker.previews import Previewer, Previews
from torch import nn

from tests.benchmarks import setting

ROUNDS = 50
LATENTS = {
    "Stable Diffusion XL": (1, 4, 128, 128),
    "Stable Diffusion 3": (1, 16, 128, 128),
    "Flux, packed": (1, 4096, 64),
    "Sana": (1, 32, 32, 32),
}


class Pipeline:
    """As much of one as previews look at."""

    def __init__(self, vae: nn.Module) -> None:
        self.vae = vae


class Result:
    """What it has made."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images


def main() -> None:
    torch.set_num_threads(1)
    for name, shape in LATENTS.items():
        latents, images = torch.randn(shape), torch.rand(1, 3, 1024, 1024)
        with ThreadPoolExecutor(1) as pool:
            previews, pipeline = Previews(pool), Pipeline(nn.Identity())
            watch(previews, pipeline, latents).fit(Result(images))
            previewer = watch(previews, pipeline, latents)

            def engine(previewer: Previewer = previewer, latents: torch.Tensor = latents) -> None:
                previewer.stepped(None, None, (latents,), 1, 10)

            times, whole = [], []
            for _ in range(ROUNDS):
                times.append(setting.seconds(engine))
                whole.append(times[-1] + setting.seconds(lambda: pool.submit(lambda: None).result()))
        print(f"{name:20} engine {setting.spread(times)}, until it is on its way {setting.spread(whole)}")


def watch(previews: Previews, pipeline: Any, latents: torch.Tensor) -> Previewer:
    sizes = {"height": 1024, "width": 1024}
    previewer = previews.of(pipeline, sizes, PreviewOptions(1, 256), lambda preview: None)
    assert previewer is not None, "there is a decoder"
    previewer.stepped(None, None, (latents,), 10, 10)
    return previewer


if __name__ == "__main__":
    main()

"""Loading a checkpoint from the page cache: the daemon's loader beside `from_pretrained`, in one process and in turns.

The checkpoint is as Stable Diffusion's, with a smaller UNet: about 950 MB in float32. Both times end when no page of a
file is left to be read. A local directory is hashed when it is seen first, which `from_pretrained` never does; files of
the Hub's cache are named by their digests.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoPipelineForText2Image, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel

from tests import checkpoints
from tests.benchmarks import setting
from tests.unit.worker_driver import Driver

ROUNDS = 5


def checkpoint(folder: Path) -> Path:
    tokenizer = checkpoints.clip_tokenizer(folder / "tokenizer")
    text_encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12))
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    unet = checkpoints.tiny_unet(
        block_out_channels=(192, 320), cross_attention_dim=768, layers_per_block=2, norm_num_groups=32
    )
    StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=checkpoints.ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def compare(name: str, folder: Path, dtype: str, *, is_hashed: bool) -> None:
    driver = Driver(folder)

    def theirs() -> None:
        pipeline = AutoPipelineForText2Image.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
        # Mapped weights are read when they are used first.
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            for parameter in module.parameters():
                parameter.sum()

    def ours() -> None:
        driver.load("pipelines/a", folder, dtype=dtype)

    times: dict[Callable[[], None], list[float]] = {theirs: [], ours: []}
    owned = list[float]()
    for _ in range(ROUNDS + 1):
        for file in folder.rglob("*.safetensors"):
            if is_hashed:
                file.touch()
        for way, taken in times.items():
            taken.append(setting.seconds(way))
            if way is ours:
                owned.append(setting.seconds(lambda: settle(driver)))
                driver.unload("pipelines/a")
            gc.collect()
    for taken in times.values():
        # The first one also imports.
        del taken[0]
    ratio = statistics.median(times[ours]) / statistics.median(times[theirs])
    print(
        f"{name:<34} from_pretrained {setting.spread(times[theirs])}, here {setting.spread(times[ours])}: ×{ratio:.2f}",
        flush=True,
    )
    print(f"{'copied out of the files, beside use':<34} {setting.spread(owned)}", flush=True)
    driver.load("pipelines/a", folder, dtype=dtype)
    settle(driver)
    names = iter(range(9))
    again = [setting.seconds(lambda: driver.load(f"pipelines/b{next(names)}", folder, dtype=dtype)) for _ in range(9)]
    print(f"{'the same content again':<34} {setting.spread(again)}", flush=True)
    driver.close()


def settle(driver: Driver) -> None:
    """Returns when the weights are the process's own."""
    while not driver.worker._residency.is_settled:
        time.sleep(0.005)


def gaps(folder: Path, small: Path) -> None:
    """The longest time between two steps of a request, while another checkpoint is loaded and alone."""
    driver = Driver(folder, small)
    driver.load("pipelines/a", small)
    # The first request of a process also pays for what libraries prepare.
    _longest_gap(driver.generate("pipelines/a", prompt="a", num_inference_steps=100, height=64, width=64))
    # In another element type nothing of the small one is held already.
    loads = {"the small checkpoint": (small, "float16"), "the large one": (folder, "float32")}
    for name, wanted in {"nothing": None, **loads}.items():
        longest = []
        for index in range(ROUNDS):
            running = driver.generate("pipelines/a", prompt="a", num_inference_steps=100, height=64, width=64)
            if wanted is not None:
                load = partial(driver.load, f"pipelines/x{index}", wanted[0], dtype=wanted[1])
                loading = threading.Thread(target=load)
                loading.start()
            longest.append(_longest_gap(running))
            if wanted is not None:
                loading.join()
                driver.unload(f"pipelines/x{index}")
        print(f"longest gap between steps, beside a load of {name:<21} {setting.spread(longest)}", flush=True)
    driver.close()


def _longest_gap(running: Any) -> float:
    moments = []
    while type(event := running.next()).__name__ not in ("Done", "Failed"):
        if type(event).__name__ == "Progress":
            moments.append(time.perf_counter())
    return max(after - before for before, after in itertools.pairwise(moments))


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkpoint(Path(temporary, "large"))
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        print(f"{size / 1e6:.0f} MB of weights in the page cache")
        compare("float32, digests known", folder, "float32", is_hashed=False)
        compare("float32, hashed first", folder, "float32", is_hashed=True)
        compare("to float16, digests known", folder, "float16", is_hashed=False)
        gaps(folder, checkpoints.stable_diffusion(Path(temporary, "small")))


if __name__ == "__main__":
    main()

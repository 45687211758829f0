"""What every server that we compare with runs: diffusers' own pipelines of three tasks over one set of weights.

A batch is made as people do it who batch requests: those that agree in task, steps and noise scheduler become one
`__call__` with lists of prompts and generators, one such call after another.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import diffusers
import diffusers.utils.logging
import torch
import transformers.utils.logging
from PIL import Image

SIZE = 64
MAX_BATCH = 16
# Seconds that a batch waits for more, where a server wants to know.
BATCH_WAIT = 0.005


class Pictures:
    """`draw` takes requests as JSON: {"task", "steps", "scheduler", "seed"}; each gives one PNG."""

    def __init__(self, folder: str) -> None:
        torch.set_num_threads(1)
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        loaded = diffusers.AutoPipelineForText2Image.from_pretrained(folder)
        self._pipelines: dict[str, Any] = {
            "text-to-image": loaded,
            "image-to-image": diffusers.AutoPipelineForImage2Image.from_pipe(loaded),
            "inpainting": diffusers.AutoPipelineForInpainting.from_pipe(loaded),
        }
        for pipeline in self._pipelines.values():
            pipeline.set_progress_bar_config(disable=True)
        self._config = loaded.scheduler.config
        self._image = Image.new("RGB", (SIZE, SIZE), (200, 80, 20))
        self._mask = Image.new("L", (SIZE, SIZE), 255)

    def draw(self, requests: Sequence[str | bytes]) -> list[bytes]:
        groups: defaultdict[tuple[str, int, str], list[int]] = defaultdict(list)
        asked = [json.loads(request) for request in requests]
        for index, ask in enumerate(asked):
            groups[ask["task"], ask["steps"], ask["scheduler"]].append(index)
        drawn: dict[int, bytes] = {}
        for (task, steps, scheduler), members in groups.items():
            images = self._run(task, steps, scheduler, [asked[index]["seed"] for index in members])
            drawn |= dict(zip(members, map(_png, images), strict=True))
        return [drawn[index] for index in range(len(requests))]

    def _run(self, task: str, steps: int, scheduler: str, seeds: list[int]) -> list[Image.Image]:
        pipeline = self._pipelines[task]
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(self._config)
        arguments: dict[str, Any] = {"num_inference_steps": steps, "strength": 1.0}
        match task:
            case "text-to-image":
                arguments = {"num_inference_steps": steps, "height": SIZE, "width": SIZE}
            case "image-to-image":
                arguments |= {"image": self._image}
            case "inpainting":
                arguments |= {"image": self._image, "mask_image": self._mask, "height": SIZE, "width": SIZE}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images: list[Image.Image] = pipeline(["red apple"] * len(seeds), generator=generators, **arguments).images
        return images


def _png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=1)
    return data.getvalue()

"""The embedded model: it draws what it is asked for, in all three tasks, in its place in the package."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from denoised import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image, Pipeline
from denoised_server.demo import CHECKPOINT
from PIL import Image

from tests import demo_pictures
from tests.daemon import Daemon

PROMPTS = ("red apple", "hamburger", "sunflower", "panda face", "butterfly", "rocket", "fire engine", "octopus")
OPTIONS: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 4.0, "seed": 1}


@pytest.fixture(scope="module")
def pipe(daemon: Daemon) -> Iterator[Pipeline]:
    with (
        daemon.client() as client,
        AutoPipelineForText2Image.from_pretrained("demo", client=client) as pipe,
    ):
        yield pipe


@pytest.fixture(scope="module")
def drawn(pipe: Pipeline) -> dict[str, Image.Image]:
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        results = threads.map(lambda prompt: pipe(prompt, **OPTIONS), PROMPTS)
        return {prompt: result.images[0] for prompt, result in zip(PROMPTS, results, strict=True)}


def test_it_draws_what_it_is_asked_for(drawn: dict[str, Image.Image]) -> None:
    known = demo_pictures.pictures()
    found = {prompt: demo_pictures.nearest(image, known) for prompt, image in drawn.items()}
    assert sum(prompt == picture for prompt, picture in found.items()) >= len(PROMPTS) - 1, found


def test_a_phrase_with_unknown_words_does(pipe: Pipeline) -> None:
    image = pipe("a picture of a red apple zzyx", **OPTIONS).images[0]
    assert demo_pictures.nearest(image, demo_pictures.pictures()) == "red apple"


def test_image_to_image_moves_from_one_thing_to_another(pipe: Pipeline, drawn: dict[str, Image.Image]) -> None:
    with AutoPipelineForImage2Image.from_pipe(pipe) as image_to_image:
        asked = OPTIONS | {"prompt": "sunflower", "image": drawn["rocket"]}
        near = image_to_image(**asked, strength=0.1).images[0]
        far = image_to_image(**asked, strength=0.95).images[0]
    known = demo_pictures.pictures()
    assert demo_pictures.nearest(near, known) == "rocket"
    assert demo_pictures.nearest(far, known) == "sunflower"


def test_inpainting_keeps_what_is_not_masked(pipe: Pipeline, drawn: dict[str, Image.Image]) -> None:
    picture, mask = drawn["panda face"], np.zeros((64, 64), "uint8")
    mask[:, 32:] = 255
    with AutoPipelineForInpainting.from_pipe(pipe) as inpainting:
        made = inpainting("tiger face", image=picture, mask_image=Image.fromarray(mask), strength=1.0, **OPTIONS)
    before, after = (np.asarray(image, dtype=float) for image in (picture, made.images[0]))
    kept, painted = (np.abs(after - before)[:, half].mean() for half in (slice(0, 24), slice(40, 64)))
    assert kept < 12
    assert painted > 2 * kept


def test_it_takes_16_megabytes_of_a_wheel() -> None:
    packed = sum(len(zlib.compress(file.read_bytes())) for file in CHECKPOINT.rglob("*") if file.is_file())
    assert packed < 16_000_000

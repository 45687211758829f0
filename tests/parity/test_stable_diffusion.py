"""Stable Diffusion, three tasks from one source, remotely and in this process.

With batching forbidden every bit is the same; joined with others, outputs differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import denoised
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.daemon import Daemon

torch.set_num_threads(1)
# What float32 rounding of joined calls may add up to, for pixels in [0, 1].
TOLERANCE = 1e-4
TASKS = {
    "text-to-image": "AutoPipelineForText2Image",
    "image-to-image": "AutoPipelineForImage2Image",
    "inpainting": "AutoPipelineForInpainting",
}


def picture(size: int = 64) -> Image.Image:
    ramp = np.linspace(0, 255, size * size * 3).reshape(size, size, 3)
    return Image.fromarray(ramp.astype("uint8"))


def mask(size: int = 64) -> Image.Image:
    half = np.zeros((size, size), "uint8")
    half[:, size // 2 :] = 255
    return Image.fromarray(half)


def arguments(task: str, index: int = 0) -> dict[str, Any]:
    prompt, steps = f"a cat {index}", 5 + index
    shared = {"prompt": prompt, "num_inference_steps": steps, "output_type": "np"}
    match task:
        case "text-to-image":
            return {**shared, "height": 64, "width": 64, "negative_prompt": "a dog"}
        case "image-to-image":
            return {**shared, "image": picture(), "strength": 0.7, "guidance_scale": 5}
    return {**shared, "image": picture(), "mask_image": mask(), "strength": 0.9, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def local(sd_checkpoint: Path) -> dict[str, Any]:
    source = diffusers.AutoPipelineForText2Image.from_pretrained(sd_checkpoint)
    pipelines = {task: getattr(diffusers, name).from_pipe(source) for task, name in TASKS.items()}
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


@pytest.fixture(scope="module")
def remote(daemon: Daemon, sd_checkpoint: Path) -> Iterator[dict[str, Any]]:
    with daemon.client() as client:
        source = denoised.AutoPipelineForText2Image.from_pretrained(sd_checkpoint, client=client)
        pipelines = {task: getattr(denoised, name).from_pipe(source) for task, name in TASKS.items()}
        yield pipelines
        for pipeline in (source, *pipelines.values()):
            pipeline.unload()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("task", TASKS)
def test_alone_every_bit_is_the_same(local: dict[str, Any], remote: dict[str, Any], task: str) -> None:
    expected = local[task](**arguments(task), generator=seeded(1)).images
    actual = remote[task](**arguments(task), generator=seeded(1), batching="forbid").images
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("output_type", ["pil", "pt", "latent"])
def test_every_kind_of_output_is_the_same(
    local: dict[str, Any], remote: dict[str, Any], task: str, output_type: str
) -> None:
    asked = arguments(task) | {"output_type": output_type}
    expected = local[task](**asked, generator=seeded(2)).images
    actual = remote[task](**asked, generator=seeded(2), batching="forbid").images
    if output_type == "pil":
        assert [each.mode for each in actual] == [each.mode for each in expected]
        expected, actual = ([np.asarray(each) for each in images] for images in (expected, actual))
        np.testing.assert_array_equal(actual, expected)
    else:
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


def as_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype="float32")[None] / 255


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(as_array(image)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", [as_array, as_tensor], ids=["numpy", "torch"])
def test_arrays_and_tensors_take_their_own_paths(
    local: dict[str, Any], remote: dict[str, Any], kind: Callable[[Image.Image], Any]
) -> None:
    asked = arguments("image-to-image") | {"image": kind(picture())}
    expected = local["image-to-image"](**asked, generator=seeded(3)).images
    actual = remote["image-to-image"](**asked, generator=seeded(3), batching="forbid").images
    np.testing.assert_array_equal(actual, expected)


def test_several_prompts_images_and_generators(local: dict[str, Any], remote: dict[str, Any]) -> None:
    asked = {
        "prompt": ["a cat", "a dog"],
        "num_images_per_prompt": 2,
        "num_inference_steps": 4,
        "height": 64,
        "width": 64,
        "output_type": "np",
    }
    expected = local["text-to-image"](**asked, generator=[seeded(i) for i in range(4)]).images
    actual = remote["text-to-image"](**asked, generator=[seeded(i) for i in range(4)], batching="forbid").images
    np.testing.assert_array_equal(actual, expected)


def test_embeddings_and_latents_as_tensors(local: dict[str, Any], remote: dict[str, Any]) -> None:
    embeddings, negative = local["text-to-image"].encode_prompt("a cat", "cpu", 1, True)
    asked = {
        "prompt_embeds": embeddings,
        "negative_prompt_embeds": negative,
        "latents": torch.randn(1, 4, 8, 8, generator=seeded(9)),
        "num_inference_steps": 3,
        "output_type": "np",
    }
    expected = local["text-to-image"](**asked).images
    np.testing.assert_array_equal(remote["text-to-image"](**asked, batching="forbid").images, expected)


def test_a_generator_is_left_as_diffusers_leaves_it(local: dict[str, Any], remote: dict[str, Any]) -> None:
    here, there = seeded(4), seeded(4)
    local["image-to-image"](**arguments("image-to-image"), generator=here)
    remote["image-to-image"](**arguments("image-to-image"), generator=there, batching="forbid")
    assert torch.equal(here.get_state(), there.get_state())


def test_the_seed_that_is_returned_gives_the_same_image(remote: dict[str, Any]) -> None:
    drawn = remote["text-to-image"](**arguments("text-to-image"), batching="forbid")
    (seed,) = drawn.seeds
    again = remote["text-to-image"](**arguments("text-to-image"), seed=seed, batching="forbid")
    np.testing.assert_array_equal(again.images, drawn.images)


def test_a_pipeline_loaded_for_a_task_equals_one_derived_for_it(
    local: dict[str, Any], daemon: Daemon, sd_checkpoint: Path
) -> None:
    with (
        daemon.client() as client,
        denoised.AutoPipelineForInpainting.from_pretrained(sd_checkpoint, client=client) as loaded,
    ):
        actual = loaded(**arguments("inpainting"), generator=seeded(1), batching="forbid").images
    np.testing.assert_array_equal(actual, local["inpainting"](**arguments("inpainting"), generator=seeded(1)).images)


@pytest.mark.parametrize("batching", ["forbid", "allow"])
def test_twelve_mixed_requests_at_once(local: dict[str, Any], remote: dict[str, Any], batching: str) -> None:
    tasks = [list(TASKS)[index % 3] for index in range(12)]
    expected = [
        local[task](**arguments(task, index), generator=seeded(index)).images for index, task in enumerate(tasks)
    ]
    with ThreadPoolExecutor(12) as threads:
        results = list(
            threads.map(
                lambda each: remote[each[1]](
                    **arguments(each[1], each[0]), generator=seeded(each[0]), batching=batching
                ),
                enumerate(tasks),
            )
        )
    for result, reference in zip(results, expected, strict=True):
        if batching == "forbid":
            np.testing.assert_array_equal(result.images, reference)
            assert result.timings.joined_calls == 0
        else:
            np.testing.assert_allclose(result.images, reference, atol=TOLERANCE)
    if batching == "allow":
        assert max(result.timings.max_joined for result in results) > 2

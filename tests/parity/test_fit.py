"""Weights that do not fit the asked task are refused when they are loaded or derived, not when they are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import denoised
import numpy as np
import pytest
import torch
from denoised.errors import TaskNotSupportedError

from tests.daemon import Daemon

from .checkpoints import kandinsky, stable_diffusion, stable_diffusion_xl
from .checkpoints.family import picture

TEXT = denoised.AutoPipelineForText2Image
IMAGE = denoised.AutoPipelineForImage2Image
INPAINT = denoised.AutoPipelineForInpainting


def built(folder: Path, build: Callable[[Path], object]) -> Path:
    torch.manual_seed(0)
    build(folder)
    return folder


@pytest.fixture(scope="module")
def folder(checkpoint_dir: Path) -> Path:
    return checkpoint_dir / "fit"


@pytest.mark.parametrize(
    ("build", "auto_class", "reason"),
    [
        (stable_diffusion.inpainting, TEXT, "takes 9 channels, and 4 would be fed"),
        (stable_diffusion.inpainting, IMAGE, "takes 9 channels, and 4 would be fed"),
        (stable_diffusion_xl.inpainting, TEXT, "takes 9 channels, and 4 would be fed"),
        (stable_diffusion_xl.refiner, TEXT, "told 5 numbers of each picture, and 6 would be sent"),
        (kandinsky.kandinsky, INPAINT, "takes 4 channels, and 9 would be fed"),
        (kandinsky.kandinsky22, INPAINT, "takes 4 channels, and 9 would be fed"),
        (kandinsky.kandinsky22_inpainting, TEXT, "takes 9 channels, and 4 would be fed"),
    ],
)
def test_loading_for_a_task_that_the_weights_do_not_fit_is_refused(
    daemon: Daemon, folder: Path, build: Callable[[Path], object], auto_class: Any, reason: str
) -> None:
    source = built(folder / f"{build.__module__}.{build.__name__}", build)
    with daemon.client() as client:
        before = daemon.metric("denoised_component_bytes")
        with pytest.raises(TaskNotSupportedError, match=reason):
            auto_class.from_pretrained(source, client=client)
        assert daemon.metric("denoised_component_bytes") == before


def test_deriving_for_a_task_that_the_weights_do_not_fit_is_refused_and_harms_nothing(
    daemon: Daemon, folder: Path
) -> None:
    source = built(folder / "derived", stable_diffusion.inpainting)
    asked: dict[str, Any] = {
        "image": picture(),
        "mask_image": picture(),
        "num_inference_steps": 2,
        "output_type": "np",
        "seed": 1,
    }
    with daemon.client() as client, INPAINT.from_pretrained(source, client=client) as pipe:
        before = pipe("a cat", **asked).images
        with pytest.raises(TaskNotSupportedError, match="takes 9 channels"):
            TEXT.from_pipe(pipe)
        with pytest.raises(TaskNotSupportedError, match="takes 9 channels"):
            IMAGE.from_pipe(pipe)
        np.testing.assert_array_equal(pipe("a cat", **asked).images, before)


def test_a_control_image_that_is_missing_is_refused_and_the_next_request_is_bit_identical(
    daemon: Daemon, folder: Path
) -> None:
    source = built(folder / "control", stable_diffusion.controlnet)
    asked: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", "seed": 1, "batching": "forbid"}
    with daemon.client() as client, TEXT.from_pretrained(source, client=client) as pipe:
        before = pipe("a cat", image=picture(), **asked).images
        with pytest.raises(denoised.InvalidRequestError):
            pipe("a cat", **asked)
        np.testing.assert_array_equal(pipe("a cat", image=picture(), **asked).images, before)
        beside = IMAGE.from_pipe(pipe)
        with pytest.raises(denoised.InvalidRequestError):
            beside("a cat", image=picture(), **asked)
        np.testing.assert_array_equal(pipe("a cat", image=picture(), **asked).images, before)
        beside.unload()


def test_two_sets_of_controlnets_that_begin_alike_are_not_taken_for_one(daemon: Daemon, folder: Path) -> None:
    one = built(folder / "one", stable_diffusion.controlnets)
    other = built(folder / "other", stable_diffusion.controlnets)
    weights = next((other / "controlnet_1").glob("*.safetensors"))
    weights.write_bytes(next((other / "controlnet").glob("*.safetensors")).read_bytes())
    with (
        daemon.client() as client,
        TEXT.from_pretrained(one, client=client) as first,
        TEXT.from_pretrained(other, client=client) as second,
    ):
        asked: dict[str, Any] = {
            "image": [picture(), picture()],
            "num_inference_steps": 1,
            "output_type": "np",
            "seed": 1,
        }
        assert not np.array_equal(first("a cat", **asked).images, second("a cat", **asked).images)

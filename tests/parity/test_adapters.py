"""Adapters through the daemon against diffusers in this process: the same file, diffusers' own calls."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import denoised
import numpy as np
import pytest
import torch
from denoised import Adapter
from denoised.errors import AdapterMismatchError, AdapterNotFoundError, InvalidFieldError
from diffusers import StableDiffusionPipeline

from tests import adapter_files
from tests.daemon import Daemon

TOLERANCE = 1e-4
ASKED: dict[str, Any] = {"num_inference_steps": 4, "height": 64, "width": 64, "output_type": "np"}


@pytest.fixture(scope="module")
def loras(checkpoint_dir: Path, sd_checkpoint: Path) -> Path:
    pipe = StableDiffusionPipeline.from_pretrained(sd_checkpoint)
    folder = checkpoint_dir / "parity-loras"
    adapter_files.lora(folder / "a.safetensors", seed=1, unet=pipe.unet, text_encoder=pipe.text_encoder)
    adapter_files.lora(folder / "b.safetensors", seed=2, rank=4, unet=pipe.unet)
    return folder


@pytest.fixture(scope="module")
def remote(daemon: Daemon, sd_checkpoint: Path) -> Iterator[denoised.Pipeline]:
    with (
        daemon.client() as client,
        denoised.AutoPipelineForText2Image.from_pretrained(sd_checkpoint, client=client) as pipe,
    ):
        yield pipe


def local(sd_checkpoint: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(sd_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def expected(sd_checkpoint: Path, loras: Path, scales: dict[str, float], seed: int) -> Any:
    pipe = local(sd_checkpoint)
    with warnings.catch_warnings():
        # PEFT advises against several adapters.
        warnings.simplefilter("ignore")
        for name in scales:
            pipe.load_lora_weights(loras, weight_name=f"{name}.safetensors", adapter_name=name)
    if scales:
        pipe.set_adapters([*scales], [*scales.values()])
    return pipe(f"a cat {seed}", generator=seeded(seed), **ASKED).images


@pytest.mark.parametrize("batching", ["forbid", "allow"])
def test_requests_with_different_adapters_at_once(
    remote: denoised.Pipeline, sd_checkpoint: Path, loras: Path, batching: Any
) -> None:
    chosen: list[dict[str, float]] = [{}, {"a": 1.0}, {"a": 1.0}, {"a": 0.4, "b": 1.0}, {"b": 0.6}, {}]

    def ask(index: int) -> Any:
        adapters = [Adapter(loras, scale, weight_name=f"{n}.safetensors") for n, scale in chosen[index].items()]
        return remote(f"a cat {index}", seed=index, adapters=adapters or None, batching=batching, **ASKED)

    with ThreadPoolExecutor(len(chosen)) as threads:
        results = list(threads.map(ask, range(len(chosen))))
    for index, scales in enumerate(chosen):
        reference = expected(sd_checkpoint, loras, scales, index)
        if batching == "forbid":
            np.testing.assert_array_equal(results[index].images, reference)
        else:
            np.testing.assert_allclose(results[index].images, reference, atol=TOLERANCE)


def test_bad_adapters_say_what_is_wrong(remote: denoised.Pipeline, loras: Path) -> None:
    before = remote("a", seed=1, batching="forbid", **ASKED).images
    (loras / "odd.safetensors").write_bytes((loras / "b.safetensors").read_bytes().replace(b"unet.", b"nett."))
    with pytest.raises(AdapterMismatchError) as caught:
        remote("a", adapters=[Adapter(loras, weight_name="odd.safetensors")], **ASKED)
    assert caught.value.hint
    with pytest.raises(InvalidFieldError, match="twice"):
        remote("a", adapters=[Adapter(loras, weight_name="a.safetensors")] * 2, **ASKED)
    with pytest.raises((AdapterNotFoundError, denoised.LoadError)):
        remote("a", adapters=["nobody/nothing"], **ASKED)
    np.testing.assert_array_equal(remote("a", seed=1, batching="forbid", **ASKED).images, before)

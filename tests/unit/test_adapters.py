"""Adapters of requests in a real worker, against diffusers with its own calls in this process."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from denoised.errors import (
    AdapterMismatchError,
    AdapterNotFoundError,
    DamagedWeightsError,
    InvalidFieldError,
    RepoNotFoundError,
    SourceNotAllowedError,
)
from denoised_server.messages import Adapter, AdapterSource
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from tests import adapter_files, checkpoints
from tests.unit.worker_driver import Driver, finished, images

SIZE: dict[str, Any] = {"height": 64, "width": 64}
TOLERANCE = 1e-4


@pytest.fixture
def driver(checkpoint_dir: Path) -> Iterator[Driver]:
    driver = Driver(checkpoint_dir)
    yield driver
    driver.close()


@pytest.fixture(scope="module")
def loras(checkpoint_dir: Path, sd_checkpoint: Path) -> Path:
    """A folder with LoRAs for Stable Diffusion: "a" with a text encoder's part, "b" without."""
    pipe = StableDiffusionPipeline.from_pretrained(sd_checkpoint)
    folder = checkpoint_dir / "loras"
    adapter_files.lora(folder / "a.safetensors", seed=1, unet=pipe.unet, text_encoder=pipe.text_encoder)
    adapter_files.lora(folder / "b.safetensors", seed=2, rank=4, unet=pipe.unet)
    adapter_files.lora(folder / "c.safetensors", seed=3, unet=pipe.unet, text_encoder=pipe.text_encoder)
    return folder


def adapter(folder: Path, name: str, scale: Any = 1.0) -> Adapter:
    return Adapter(source=AdapterSource(str(folder), weight_name=f"{name}.safetensors"), scale=scale)


def request(index: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"a cat {index}", "seed": index, "num_inference_steps": 4, **SIZE, **more}


def local(
    checkpoint: Path, loras: Path, scales: dict[str, Any], index: int, kind: Any = StableDiffusionPipeline
) -> Any:
    pipe = kind.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        # PEFT advises against several adapters.
        warnings.simplefilter("ignore")
        for name in scales:
            pipe.load_lora_weights(loras, weight_name=f"{name}.safetensors", adapter_name=f"user_{name}")
    if scales:
        pipe.set_adapters([f"user_{name}" for name in scales], list(scales.values()))
    asked = request(index)
    seed = asked.pop("seed")
    return pipe(**asked, generator=torch.Generator().manual_seed(seed), output_type="np").images


SETS: dict[str, dict[str, Any]] = {
    "one": {"a": 1.0},
    "a smaller scale": {"a": 0.4},
    "none for the text encoder": {"b": 0.7},
    "two": {"a": 0.5, "b": 0.8},
    "two, the other way round": {"b": 0.8, "a": 0.5},
    "two with text encoders": {"c": 1.0, "a": 0.3},
    "a scale for each part": {"a": {"unet": {"down": 0.9, "mid": 1.0, "up": 0.2}, "text_encoder": 0.5}},
}


@pytest.mark.parametrize("scales", SETS.values(), ids=SETS)
def test_a_request_with_adapters_gives_the_bits_of_diffusers(
    driver: Driver, sd_checkpoint: Path, loras: Path, scales: dict[str, Any]
) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    plain = images(driver.generate("pipelines/a", **request(1), forbid=True).result())
    adapters = tuple(adapter(loras, name, scale) for name, scale in scales.items())
    adapted = images(driver.generate("pipelines/a", **request(1), forbid=True, adapters=adapters).result())
    np.testing.assert_array_equal(adapted, local(sd_checkpoint, loras, scales, 1))
    assert not np.allclose(adapted, plain, atol=1e-3)
    again = images(driver.generate("pipelines/a", **request(1), forbid=True).result())
    np.testing.assert_array_equal(again, plain)
    np.testing.assert_array_equal(again, local(sd_checkpoint, loras, {}, 1))


def test_an_adapter_of_stable_diffusion_xl(driver: Driver, sdxl_checkpoint: Path) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_checkpoint)
    folder = sdxl_checkpoint.parent / "loras-xl"
    parts = {role: getattr(pipe, role) for role in ("unet", "text_encoder", "text_encoder_2")}
    adapter_files.lora(folder / "a.safetensors", **parts)
    driver.load("pipelines/a", sdxl_checkpoint)
    adapters = (adapter(folder, "a", 0.6),)
    adapted = images(driver.generate("pipelines/a", **request(1), forbid=True, adapters=adapters).result())
    expected = local(sdxl_checkpoint, folder, {"a": 0.6}, 1, StableDiffusionXLPipeline)
    np.testing.assert_array_equal(adapted, expected)


def test_requests_with_different_adapters_run_at_once(driver: Driver, sd_checkpoint: Path, loras: Path) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    driver.derive("pipelines/b", "pipelines/a", "image-to-image")
    chosen = [{}, {"a": 0.5}, {"a": 0.5}, {"b": 1.0}, {"a": 0.5, "b": 1.0}, {}]
    for _ in range(2):
        running = [
            driver.generate(
                "pipelines/a",
                **request(index),
                adapters=tuple(adapter(loras, name, scale) for name, scale in scales.items()) or None,
            )
            for index, scales in enumerate(chosen)
        ]
        together = [each.result() for each in running]
        for index, scales in enumerate(chosen):
            expected = local(sd_checkpoint, loras, scales, index)
            np.testing.assert_allclose(images(together[index]), expected, atol=TOLERANCE)
    for index in (1, 2):
        assert finished(together[index]).max_joined >= 2, "equal adapters join each other"


def test_each_file_is_held_once_whatever_it_is_combined_with(driver: Driver, sd_checkpoint: Path, loras: Path) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    before = driver.snapshot().weight_bytes
    for scales in (
        {"a": 1.0},
        {"a": 0.5},
        {"b": 1.0},
        {"a": 1.0, "b": 0.3},
        {"b": 0.2, "c": 1.0},
        {"a": 1.0, "c": 1.0},
    ):
        adapters = tuple(adapter(loras, name, scale) for name, scale in scales.items())
        driver.generate("pipelines/a", **request(0), adapters=adapters).result()
    snapshot = driver.snapshot()
    held = [part for part in snapshot.components if part.class_name == "LoRA"]
    assert len(held) == 3
    files = [load_file(loras / f"{name}.safetensors") for name in "abc"]
    assert sum(part.weight_bytes for part in held) == sum(tensor.nbytes for each in files for tensor in each.values())
    assert snapshot.weight_bytes == before + sum(part.weight_bytes for part in held)
    assert driver.unload("pipelines/a") == snapshot.weight_bytes
    assert driver.snapshot().weight_bytes == 0


def test_a_derived_pipeline_uses_the_same_adapter(driver: Driver, sd_checkpoint: Path, loras: Path) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    driver.derive("pipelines/b", "pipelines/a", "image-to-image")
    adapters = (adapter(loras, "a"),)
    driver.generate("pipelines/a", **request(0), adapters=adapters).result()
    before = driver.snapshot().weight_bytes
    image = torch.rand(1, 3, 64, 64)
    driver.generate("pipelines/b", prompt="a", image=image, num_inference_steps=4, adapters=adapters).result()
    assert driver.snapshot().weight_bytes == before
    (held,) = [part for part in driver.snapshot().components if part.class_name == "LoRA"]
    assert held.pipelines == ("pipelines/a", "pipelines/b")
    driver.unload("pipelines/a")
    assert [part for part in driver.snapshot().components if part.class_name == "LoRA"]
    driver.unload("pipelines/b")
    assert driver.snapshot().weight_bytes == 0


def test_a_request_that_is_cancelled_half_way_leaves_nothing_on_the_pipeline(
    driver: Driver, sd_checkpoint: Path, loras: Path
) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    before = images(driver.generate("pipelines/a", **request(0), forbid=True).result())
    running = driver.generate("pipelines/a", **request(0, num_inference_steps=500), adapters=(adapter(loras, "a"),))
    running.next()
    running.cancel()
    running.result()
    np.testing.assert_array_equal(images(driver.generate("pipelines/a", **request(0), forbid=True).result()), before)


def test_what_is_idle_goes_before_the_budget_is_passed(checkpoint_dir: Path, sd_checkpoint: Path, loras: Path) -> None:
    size = max(path.stat().st_size for path in loras.glob("*.safetensors"))
    measured = Driver(checkpoint_dir)
    measured.load("pipelines/a", sd_checkpoint)
    budget = measured.snapshot().weight_bytes + int(size * 1.5)
    measured.close()
    driver = Driver(checkpoint_dir, budget=budget)
    try:
        driver.load("pipelines/a", sd_checkpoint)
        for name in "abcab":
            driver.generate("pipelines/a", **request(0), adapters=(adapter(loras, name),)).result()
            assert driver.snapshot().weight_bytes <= budget
    finally:
        driver.close()


def test_idle_adapters_make_room_for_pipelines(checkpoint_dir: Path, sd_checkpoint: Path, loras: Path) -> None:
    other = checkpoints.stable_diffusion(checkpoint_dir / "other-unet", seed=7)
    measured = Driver(checkpoint_dir)
    for name, folder in (("a", sd_checkpoint), ("b", other)):
        measured.load(f"pipelines/{name}", folder)
    budget = measured.snapshot().weight_bytes + 1000
    measured.close()
    driver = Driver(checkpoint_dir, budget=budget)
    try:
        driver.load("pipelines/a", sd_checkpoint)
        driver.generate("pipelines/a", **request(0), adapters=(adapter(loras, "a"),)).result()
        driver.load("pipelines/b", other)
        assert not [part for part in driver.snapshot().components if part.class_name == "LoRA"]
        # And idle pipelines for adapters that a request wants.
        driver.generate("pipelines/a", **request(0), adapters=(adapter(loras, "a"),)).result()
        assert {part.class_name for part in driver.snapshot().components if part.residency == "disk"}
        assert driver.snapshot().weight_bytes <= budget
    finally:
        driver.close()


def other_family(folder: Path, sdxl: Path) -> Adapter:
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl)
    adapter_files.lora(folder / "xl.safetensors", unet=pipe.unet)
    return adapter(folder, "xl")


def other_keys(folder: Path, sdxl: Path) -> Adapter:
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl)
    adapter_files.lora(folder / "flux.safetensors", transformer=pipe.unet)
    return adapter(folder, "flux")


def damaged(folder: Path, sdxl: Path) -> Adapter:
    (folder / "damaged.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:-10])
    return adapter(folder, "damaged")


def pickled(folder: Path, sdxl: Path) -> Adapter:
    torch.save({}, folder / "pickled.bin")
    return Adapter(source=AdapterSource(str(folder), weight_name="pickled.bin"))


BAD = {
    "of another family": (other_family, AdapterMismatchError),
    "with other names": (other_keys, AdapterMismatchError),
    "damaged": (damaged, DamagedWeightsError),
    "pickled": (pickled, InvalidFieldError),
    "missing": (lambda folder, _: adapter(folder, "nothing"), RepoNotFoundError),
    "outside": (lambda folder, _: Adapter(source=AdapterSource("/etc")), SourceNotAllowedError),
    "by a way out": (lambda folder, _: adapter(folder, "../../../../etc/x"), SourceNotAllowedError),
    "of no such name": (lambda folder, _: Adapter("nobody"), AdapterNotFoundError),
}


@pytest.mark.parametrize(("make", "error"), BAD.values(), ids=BAD)
def test_bad_adapters_leave_everything_as_it_was(
    driver: Driver, sd_checkpoint: Path, sdxl_checkpoint: Path, loras: Path, make: Any, error: type[Exception]
) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    before = images(driver.generate("pipelines/a", **request(0), forbid=True).result()), driver.snapshot().weight_bytes
    bad = make(loras, sdxl_checkpoint)
    with pytest.raises(error) as caught:
        driver.generate("pipelines/a", **request(0), adapters=(adapter(loras, "b"), bad)).result()
    assert "Traceback" not in str(caught.value)
    np.testing.assert_array_equal(images(driver.generate("pipelines/a", **request(0), forbid=True).result()), before[0])
    assert driver.snapshot().weight_bytes == before[1]
    assert driver.snapshot().reserved_bytes == 0
    assert not [part for part in driver.snapshot().components if part.class_name == "LoRA"]

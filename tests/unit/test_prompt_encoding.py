"""`encode_prompt` in a real worker, and configurations as the worker tells them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from denoised import media
from denoised.errors import InvalidFieldError, UnknownArgumentError
from denoised_server.messages import Generate, Output
from diffusers import StableDiffusionPipeline

from tests.unit.worker_driver import Driver, finished


@pytest.fixture
def driver(checkpoint_dir: Path) -> Iterator[Driver]:
    driver = Driver(checkpoint_dir)
    yield driver
    driver.close()


def encode(driver: Driver, **arguments: Any) -> list[Any]:
    packed = {name: media.pack(value) for name, value in arguments.items()}
    command = Generate("pipelines/a", packed, forbid_batching=True, method="encode_prompt")
    events = driver.start(command).result()
    values = {event.field: event.artifact for event in events if isinstance(event, Output)} | dict(
        finished(events).fields
    )
    return [media.unpack(values[name]) for name in finished(events).field_names]


def test_embeddings_are_those_of_one_process(driver: Driver, sd_checkpoint: Path) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    local = StableDiffusionPipeline.from_pretrained(sd_checkpoint)
    asked: dict[str, Any] = {"num_images_per_prompt": 2, "do_classifier_free_guidance": True}
    expected = local.encode_prompt(["a cat", "a dog"], "cpu", **asked)
    actual = encode(driver, prompt=["a cat", "a dog"], device="somewhere", **asked)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_what_there_is_none_of_stays_none(driver: Driver, sd_checkpoint: Path) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    embeds, negative = encode(driver, prompt="a", num_images_per_prompt=1, do_classifier_free_guidance=False)
    assert embeds.shape == (1, 77, 32)
    assert negative is None


def test_each_family_has_its_own(driver: Driver, sdxl_checkpoint: Path) -> None:
    loaded = driver.load("pipelines/a", sdxl_checkpoint)
    assert [each.name for each in loaded.encode_parameters][:3] == ["prompt", "prompt_2", "device"]
    assert [tuple(each.shape) for each in encode(driver, prompt="a", prompt_2="b")] == [
        (1, 77, 64), (1, 77, 64), (1, 32), (1, 32),
    ]  # fmt: skip


def test_what_it_does_not_take_is_named(driver: Driver, sd_checkpoint: Path) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    with pytest.raises(UnknownArgumentError, match="Did you mean 'prompt'"):
        encode(driver, promt="a")
    with pytest.raises(InvalidFieldError, match="num_images_per_prompt"):
        encode(driver, prompt="a", do_classifier_free_guidance=False)


def test_configurations_are_those_of_diffusers(driver: Driver, sd_checkpoint: Path) -> None:
    loaded = driver.load("pipelines/a", sd_checkpoint)
    local = StableDiffusionPipeline.from_pretrained(sd_checkpoint)
    of_diffusers = {name: value for name, value in local.config.items() if name != "_name_or_path"}
    assert {name: tuple(v) if isinstance(v, list) else v for name, v in loaded.config.items()} == of_diffusers
    assert loaded.component_configs["unet"]["sample_size"] == local.unet.config.sample_size
    assert loaded.component_configs["text_encoder"]["hidden_size"] == local.text_encoder.config.hidden_size
    # The recipe has it as the caller gave it.
    assert str(sd_checkpoint) not in str(replace(loaded, recipe=None))

"""What would change a shared component gives the handle a copy of its own, in the books, or is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from denoised.errors import NoRoomError
from denoised_server.messages import (
    AdapterCall,
    AdapterSource,
    Keep,
    Load,
    Loaded,
    PipelineSettings,
    Recipe,
    Spec,
    Update,
)
from diffusers import StableDiffusionPipeline

from tests import adapter_files
from tests.unit.worker_driver import Driver, images

ASKED: dict[str, Any] = {"prompt": "a <thing>", "num_inference_steps": 2, "height": 64, "width": 64, "forbid": True}


@pytest.fixture(scope="module")
def adapters(checkpoint_dir: Path, sd_checkpoint: Path) -> Path:
    pipe = StableDiffusionPipeline.from_pretrained(sd_checkpoint)
    folder = checkpoint_dir / "copied"
    adapter_files.lora(folder / "lora.safetensors", seed=1, unet=pipe.unet)
    adapter_files.textual_inversion(folder / "thing.safetensors", "<thing>")
    return folder


@pytest.fixture
def driver(checkpoint_dir: Path) -> Iterator[Driver]:
    driver = Driver(checkpoint_dir)
    yield driver
    driver.close()


def fusing(folder: Path) -> tuple[AdapterCall, ...]:
    lora = AdapterSource(str(folder), weight_name="lora.safetensors")
    return AdapterCall("load_lora_weights", (lora,), {"adapter_name": "first"}), AdapterCall("fuse_lora")


def inverting(folder: Path) -> tuple[AdapterCall, ...]:
    return (AdapterCall("load_textual_inversion", (AdapterSource(str(folder), weight_name="thing.safetensors"),)),)


CHANGES = {"fusing a LoRA": fusing, "a resized vocabulary": inverting}


def update(driver: Driver, name: str, calls: tuple[AdapterCall, ...]) -> Loaded:
    loaded: Loaded = driver.start(Update(name, PipelineSettings(adapters=calls))).result()[-1]
    return loaded


def books(driver: Driver) -> dict[str, tuple[int, tuple[str, ...]]]:
    snapshot = driver.snapshot()
    assert snapshot.weight_bytes == sum(part.weight_bytes for part in snapshot.components)
    return {part.digest: (part.weight_bytes, part.pipelines) for part in snapshot.components}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_a_copy_of_its_own_and_in_the_books(
    driver: Driver, sd_checkpoint: Path, adapters: Path, change: Any
) -> None:
    for name in "ab":
        driver.load(f"pipelines/{name}", sd_checkpoint)
    before, pictures = books(driver), [images(driver.generate(f"pipelines/{name}", **ASKED).result()) for name in "ab"]
    np.testing.assert_array_equal(*pictures)
    update(driver, "pipelines/a", change(adapters))
    after = books(driver)
    assert {digest: after[digest] for digest in before} == before, "what was shared is shared as it was"
    own = {digest: users for digest, (_, users) in after.items() if digest not in before}
    assert own
    assert set(own.values()) == {("pipelines/a",)}
    np.testing.assert_array_equal(images(driver.generate("pipelines/b", **ASKED).result()), pictures[1])
    assert not np.array_equal(images(driver.generate("pipelines/a", **ASKED).result()), pictures[0])
    update(driver, "pipelines/a", ())
    assert books(driver) == before, "and it goes when it is not wanted any more"


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_copy_that_cannot_fit_is_refused_and_changes_nothing(
    driver: Driver, checkpoint_dir: Path, sd_checkpoint: Path, adapters: Path, change: Any
) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    small = Driver(checkpoint_dir, budget=driver.snapshot().weight_bytes + 100)
    try:
        recipe = Recipe(Spec(str(sd_checkpoint), task="text-to-image"))
        small.start(Load("pipelines/a", recipe, keep=Keep(pinned=True))).result()
        before, picture = books(small), images(small.generate("pipelines/a", **ASKED).result())
        with pytest.raises(NoRoomError) as caught:
            update(small, "pipelines/a", change(adapters))
        assert caught.value.retry_after is not None
        assert {"needed_bytes", "free_bytes", "evictable_bytes"} <= caught.value.metadata.keys()
        assert books(small) == before
        assert small.snapshot().reserved_bytes == 0
        np.testing.assert_array_equal(images(small.generate("pipelines/a", **ASKED).result()), picture)
    finally:
        small.close()


def test_a_pipeline_in_another_element_type_has_its_own_copy(driver: Driver, sd_checkpoint: Path) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    before = books(driver)
    driver.load("pipelines/b", sd_checkpoint, dtype="bfloat16")
    after = books(driver)
    assert {digest: after[digest] for digest in before} == before
    assert {users for digest, (_, users) in after.items() if digest not in before} == {("pipelines/b",)}

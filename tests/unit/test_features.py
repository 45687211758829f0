"""What `enable_…` methods switch on: for one pipeline, over components that others use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from denoised.errors import InvalidFieldError
from denoised.values import Plain
from denoised_server.messages import Load, PipelineSettings, Recipe, Spec, Update
from denoised_server.updates import Change
from denoised_server.worker.tallies import Lone
from diffusers import StableDiffusionPipeline

from tests.unit.worker_driver import Driver, images

REQUEST: dict[str, Any] = {"prompt": "a", "num_inference_steps": 3, "height": 64, "width": 64}
FREEU: dict[str, Plain] = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}


@pytest.fixture
def driver(checkpoint_dir: Path, sd_checkpoint: Path) -> Iterator[Driver]:
    driver = Driver(checkpoint_dir)
    driver.load("pipelines/a", sd_checkpoint)
    driver.derive("pipelines/b", "pipelines/a", "text-to-image")
    yield driver
    driver.close()


def set_features(driver: Driver, **features: Mapping[str, Plain]) -> None:
    driver.start(Update("pipelines/a", PipelineSettings(features=features))).result()


def paint(driver: Driver, name: str) -> Any:
    return images(driver.generate(name, **REQUEST, forbid=True).result())


def expected(local: StableDiffusionPipeline) -> Any:
    return local(**REQUEST, generator=torch.Generator().manual_seed(0), output_type="np").images


@pytest.mark.parametrize(
    ("features", "enable"),
    [
        ({"vae_tiling": {}}, lambda pipe: pipe.vae.enable_tiling()),
        ({"freeu": FREEU}, lambda pipe: pipe.enable_freeu(**FREEU)),
        ({"vae_tiling": {}, "freeu": FREEU}, lambda pipe: (pipe.vae.enable_tiling(), pipe.enable_freeu(**FREEU))),
    ],
    ids=["tiling", "freeu", "both"],
)
def test_a_feature_does_what_it_does_in_one_process_and_for_one_pipeline(
    driver: Driver,
    local: StableDiffusionPipeline,
    features: dict[str, Mapping[str, Plain]],
    enable: Callable[[Any], object],
) -> None:
    plain = expected(local)
    enable(local)
    changed = expected(local)
    assert not np.array_equal(plain, changed)
    set_features(driver, **features)
    running = [driver.generate(name, **REQUEST) for name in ("pipelines/a", "pipelines/b", "pipelines/a")]
    one, other, again = (images(each.result()) for each in running)
    for actual, wanted in ((one, changed), (again, changed), (other, plain)):
        np.testing.assert_allclose(actual, wanted, atol=1e-4)
    np.testing.assert_array_equal(paint(driver, "pipelines/a"), changed)
    np.testing.assert_array_equal(paint(driver, "pipelines/b"), plain)
    set_features(driver)
    np.testing.assert_array_equal(paint(driver, "pipelines/a"), plain)


def test_only_calls_of_what_a_feature_changes_run_alone(driver: Driver) -> None:
    set_features(driver, vae_tiling={})
    running = [driver.generate("pipelines/a", **REQUEST, seed=seed) for seed in range(3)]
    for each in running:
        each.result()
    tallies = driver.worker._engine.batches.tallies
    assert tallies["AutoencoderKL.decode"].lone_calls[Lone.CHANGED] == 3
    assert tallies["UNet2DConditionModel.forward"].lone_calls[Lone.CHANGED] == 0


def test_slices_are_decoded_one_by_one(driver: Driver) -> None:
    before = driver.snapshot().calls
    request: dict[str, Any] = {**REQUEST, "num_images_per_prompt": 3}
    plain = images(driver.generate("pipelines/a", **request, forbid=True).result())
    set_features(driver, vae_slicing={})
    np.testing.assert_allclose(
        images(driver.generate("pipelines/a", **request, forbid=True).result()), plain, atol=1e-4
    )
    assert driver.snapshot().calls > before


def test_features_survive_a_rebuild(driver: Driver, sd_checkpoint: Path) -> None:
    set_features(driver, vae_tiling={})
    settings = PipelineSettings(features={"vae_tiling": {}})
    driver.start(Load("pipelines/c", Recipe(Spec(str(sd_checkpoint), task="text-to-image"), (), settings))).result()
    np.testing.assert_array_equal(paint(driver, "pipelines/c"), paint(driver, "pipelines/a"))


@pytest.mark.parametrize(
    ("features", "says"),
    [
        ({"vae_mosaic": {}}, "is not known"),
        ({"vae_tiling": {"size": 3}}, "takes no arguments"),
        ({"freeu": {"s1": 1.0}}, "takes s1, s2, b1, b2"),
        ({"freeu": {**FREEU, "s1": "much"}}, "no ordinary number"),
        ({"freeu": {**FREEU, "s1": float("nan")}}, "no ordinary number"),
    ],
)
def test_a_feature_that_cannot_be_is_refused_and_nothing_changes(
    driver: Driver, features: dict[str, Mapping[str, Plain]], says: str
) -> None:
    before = paint(driver, "pipelines/a")
    with pytest.raises(InvalidFieldError, match=says):
        set_features(driver, **features)
    np.testing.assert_array_equal(paint(driver, "pipelines/a"), before)


def test_one_feature_is_changed_and_the_others_stay() -> None:
    present = PipelineSettings(features={"vae_tiling": {}})
    on = Change(frozenset({"features.freeu"}), PipelineSettings(features={"freeu": FREEU}))
    off = Change(frozenset({"features.vae_tiling"}), PipelineSettings())
    assert on.apply(present).features == {"vae_tiling": {}, "freeu": FREEU}
    assert off.apply(on.apply(present)).features == {"freeu": FREEU}
    assert Change(frozenset({"features"}), PipelineSettings()).apply(present) == PipelineSettings()

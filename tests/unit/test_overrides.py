"""Components from elsewhere, in a real worker: what they bring, what they share, and what they leave behind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from denoised.errors import (
    InvalidFieldError,
    InvalidNoiseSchedulerError,
    NoRoomError,
    NotAPipelineError,
    SourceNotAllowedError,
    TaskNotSupportedError,
)
from denoised_server.messages import ComponentSource, Derivation, Keep, Load, Loaded, Override, Recipe, Snapshot, Spec
from diffusers import (
    ControlNetModel,
    DDPMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from tests import checkpoints
from tests.unit.worker_driver import Driver, images

SIZE: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 3, "prompt": "a cat"}
EDGES = Image.fromarray((np.indices((64, 64)).sum(0) % 16 * 16).astype("uint8")).convert("RGB")


@pytest.fixture(scope="module")
def controlnets(checkpoint_dir: Path) -> tuple[Path, Path]:
    one, other = (checkpoints.controlnet(checkpoint_dir / f"controlnet-{seed}", seed=seed) for seed in (1, 2))
    return one, other


@pytest.fixture
def driver(checkpoint_dir: Path) -> Iterator[Driver]:
    driver = Driver(checkpoint_dir)
    yield driver
    assert driver.snapshot().reserved_bytes == 0
    driver.close()


def derive(driver: Driver, name: str, source: str, task: str = "text-to-image", **overrides: Override) -> Loaded:
    return driver.derive(name, source, task, overrides=overrides)


def run(driver: Driver, name: str, **arguments: Any) -> Any:
    return images(driver.generate(name, forbid=True, seed=1, **(SIZE | arguments)).result())


def books(snapshot: Snapshot) -> tuple[Any, ...]:
    return snapshot.weight_bytes, snapshot.reserved_bytes, snapshot.components


def classes(loaded: Loaded) -> dict[str, str]:
    return {part.role: part.class_name for part in loaded.components}


def reference(folder: Path, nets: list[Path], several: bool = False) -> Any:
    loaded = [ControlNetModel.from_pretrained(net) for net in nets]
    pipe = StableDiffusionControlNetPipeline.from_pretrained(folder, controlnet=loaded if several else loaded[0])
    pipe.set_progress_bar_config(disable=True)
    picture = [EDGES] * len(nets) if several else EDGES
    generator = torch.Generator().manual_seed(1)
    return pipe(**SIZE, image=picture, generator=generator, output_type="np").images


def test_a_controlnet_selects_the_class_and_is_held_like_any_component(
    driver: Driver, sd_checkpoint: Path, controlnets: tuple[Path, Path]
) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    before = driver.snapshot().weight_bytes
    source = ComponentSource(str(controlnets[0]))
    loaded = driver.load("pipelines/b", sd_checkpoint, overrides={"controlnet": source})
    assert loaded.pipeline_class == "StableDiffusionControlNetPipeline"
    (net,) = [part for part in loaded.components if part.role == "controlnet"]
    assert driver.snapshot().weight_bytes - before == net.weight_bytes > 0
    np.testing.assert_array_equal(run(driver, "pipelines/b", image=EDGES), reference(sd_checkpoint, [controlnets[0]]))


def test_several_controlnets_count_each_by_itself(
    driver: Driver, sd_checkpoint: Path, controlnets: tuple[Path, Path]
) -> None:
    one, other = (ComponentSource(str(net)) for net in controlnets)
    driver.load("pipelines/a", sd_checkpoint, overrides={"controlnet": one})
    before = driver.snapshot().weight_bytes
    loaded = driver.load("pipelines/b", sd_checkpoint, overrides={"controlnet": (one, other, one)})
    assert classes(loaded)["controlnet"] == "MultiControlNetModel"
    digests = [part.digest for part in loaded.components if part.role.startswith("controlnet[")]
    assert len(digests) == 3
    assert len(set(digests)) == 2
    sizes = {part.role: part.weight_bytes for part in loaded.components}
    assert sizes["controlnet"] == 0
    assert driver.snapshot().weight_bytes - before == sizes["controlnet[1]"]
    expected = reference(sd_checkpoint, [*controlnets, controlnets[0]], several=True)
    np.testing.assert_array_equal(run(driver, "pipelines/b", image=[EDGES] * 3), expected)
    driver.unload("pipelines/a")
    assert driver.unload("pipelines/b") == before + sizes["controlnet[1]"]
    assert books(driver.snapshot()) == (0, 0, ())


def test_a_derived_pipeline_brings_a_controlnet_and_outlives_its_source(
    driver: Driver, sd_checkpoint: Path, controlnets: tuple[Path, Path]
) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    plain = run(driver, "pipelines/a")
    before = driver.snapshot().weight_bytes
    loaded = derive(driver, "pipelines/b", "pipelines/a", controlnet=ComponentSource(str(controlnets[0])))
    assert loaded.pipeline_class == "StableDiffusionControlNetPipeline"
    (size,) = [part.weight_bytes for part in loaded.components if part.role == "controlnet"]
    assert driver.snapshot().weight_bytes == before + size
    assert driver.unload("pipelines/a") == 0
    np.testing.assert_array_equal(run(driver, "pipelines/b", image=EDGES), reference(sd_checkpoint, [controlnets[0]]))
    back = derive(driver, "pipelines/c", "pipelines/b", controlnet=None)
    assert back.pipeline_class == "StableDiffusionPipeline"
    np.testing.assert_array_equal(run(driver, "pipelines/c"), plain)
    assert driver.unload("pipelines/b") == size
    assert driver.unload("pipelines/c") == before


def test_a_recipe_rebuilds_what_is_left_of_it_and_nothing_else(
    driver: Driver, sd_checkpoint: Path, controlnets: tuple[Path, Path]
) -> None:
    one, other = (ComponentSource(str(net)) for net in controlnets)
    spec = Spec(str(sd_checkpoint), task="text-to-image", overrides={"controlnet": one})
    steps = (
        Derivation("image-to-image", {"controlnet": other}),
        Derivation("text-to-image", {"controlnet": None}),
        Derivation("text-to-image", {"controlnet": (other, other)}),
    )
    loaded: Loaded = driver.start(Load("pipelines/a", Recipe(spec, steps))).result()[-1]
    held = {part.digest: part.weight_bytes for part in loaded.components if part.digest}
    assert {part.digest for part in driver.snapshot().components} == set(held)
    assert driver.snapshot().weight_bytes == sum(held.values())
    expected = reference(sd_checkpoint, [controlnets[1]] * 2, several=True)
    np.testing.assert_array_equal(run(driver, "pipelines/a", image=[EDGES] * 2), expected)


def test_round_trips_keep_the_configuration(driver: Driver, sd_checkpoint: Path) -> None:
    overrides: dict[str, Override] = {"safety_checker": None, "requires_safety_checker": True}
    driver.load("pipelines/a", sd_checkpoint, overrides=overrides)
    derive(driver, "pipelines/b", "pipelines/a", "image-to-image", requires_safety_checker=False)
    derive(driver, "pipelines/c", "pipelines/b", "inpainting")
    derive(driver, "pipelines/d", "pipelines/c")
    configs = {
        name: dict(driver.worker._pipelines[f"pipelines/{name}"].pipeline.config) for name in ("a", "b", "c", "d")
    }
    assert [configs[name]["requires_safety_checker"] for name in "abcd"] == [True, False, False, False]
    assert {key: value for key, value in configs["d"].items() if not key.startswith("_")} == {
        key: value for key, value in configs["a"].items() if not key.startswith("_")
    } | {"requires_safety_checker": False}


def test_enable_pag_changes_the_class_and_nothing_in_memory(driver: Driver, sd_checkpoint: Path) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    before = driver.snapshot().weight_bytes
    assert derive(driver, "pipelines/b", "pipelines/a", enable_pag=True).pipeline_class == "StableDiffusionPAGPipeline"
    assert derive(driver, "pipelines/c", "pipelines/b", enable_pag=False).pipeline_class == "StableDiffusionPipeline"
    assert driver.snapshot().weight_bytes == before


def test_a_noise_scheduler_from_its_configuration_or_another_repository(driver: Driver, sd_checkpoint: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(sd_checkpoint)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(**SIZE, generator=torch.Generator().manual_seed(1), output_type="np").images
    alone = ComponentSource(
        class_name="DDPMScheduler",
        config={key: value for key, value in pipe.scheduler.config.items() if key != "_diffusers_version"},
    )
    there = ComponentSource(
        str(sd_checkpoint), "scheduler", class_name="DDPMScheduler", config={"timestep_spacing": "trailing"}
    )
    for name, source in (("a", alone), ("b", there)):
        loaded = driver.load(f"pipelines/{name}", sd_checkpoint, overrides={"scheduler": source})
        assert classes(loaded)["scheduler"] == "DDPMScheduler"
        np.testing.assert_array_equal(run(driver, f"pipelines/{name}"), expected)
    driver.load("pipelines/c", sd_checkpoint)
    derive(driver, "pipelines/d", "pipelines/c", scheduler=alone)
    np.testing.assert_array_equal(run(driver, "pipelines/d"), expected)
    own = StableDiffusionPipeline.from_pretrained(sd_checkpoint)
    own.set_progress_bar_config(disable=True)
    mine = own(**SIZE, generator=torch.Generator().manual_seed(1), output_type="np").images
    np.testing.assert_array_equal(run(driver, "pipelines/c"), mine)


def test_a_component_of_the_checkpoint_named_by_its_folder_is_the_same_one(driver: Driver, sd_checkpoint: Path) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    before = books(driver.snapshot())
    roles = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    overrides = {role: ComponentSource(str(sd_checkpoint), role, dtype="float32") for role in roles}
    loaded = driver.load("pipelines/b", sd_checkpoint, overrides=overrides)
    assert classes(loaded)["tokenizer"].startswith("CLIPTokenizer")
    assert driver.snapshot().weight_bytes == before[0]
    assert all(len(part.pipelines) == 2 for part in driver.snapshot().components)


def test_a_component_keeps_the_element_type_that_was_asked_for(driver: Driver, sd_checkpoint: Path) -> None:
    source = ComponentSource(str(sd_checkpoint), "vae", dtype="float32")
    loaded = driver.load("pipelines/a", sd_checkpoint, dtype="bfloat16", overrides={"vae": source})
    dtypes = {part.role: part.dtype for part in loaded.components if part.digest}
    assert dtypes == {"unet": "bfloat16", "text_encoder": "bfloat16", "vae": "float32"}


BAD_OVERRIDES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a noise scheduler that is none": (
        {"scheduler": ComponentSource(class_name="AutoencoderKL", config={})}, InvalidFieldError, "noise scheduler"
    ),
    "a noise scheduler that does not exist": (
        {"scheduler": ComponentSource(class_name="DDIMSchedular", config={})}, InvalidFieldError, "DDIMScheduler"
    ),
    "a pipeline as a component": (
        {"scheduler": ComponentSource(class_name="StableDiffusionPipeline")}, InvalidFieldError, "no|component class"
    ),
    "a function as a component": (
        {"scheduler": ComponentSource(class_name="load_image")}, InvalidFieldError, "component class"
    ),
    "a noise scheduler's name alone": ({"scheduler": "DDIMScheduler"}, InvalidFieldError, "is no component"),
    "a truth value as a component": ({"vae": True}, InvalidFieldError, "is no component"),
    "a configuration that its class refuses": (
        {"scheduler": ComponentSource(class_name="DDIMScheduler", config={"beta_schedule": "wild"})},
        InvalidNoiseSchedulerError,
        "wild",
    ),
    "a VAE in the UNet's place": (
        {"unet": ComponentSource("SD", "vae")}, InvalidFieldError, "AutoencoderKL is a autoencoder"
    ),
    "a UNet as a ControlNet": ({"controlnet": ComponentSource("SD", "unet")}, InvalidFieldError, "takes a controlnet"),
    "a text encoder as the VAE": ({"vae": ComponentSource("SD", "text_encoder")}, InvalidFieldError, "CLIPTextModel"),
    "a tokenizer as the text encoder": (
        {"text_encoder": ComponentSource("SD", "tokenizer")}, InvalidFieldError, "tokenizer"
    ),
    "weights changed by a configuration": (
        {"vae": ComponentSource("SD", "vae", config={"latent_channels": 8})}, InvalidFieldError, "cannot be changed"
    ),
    "weights from nothing": (
        {"vae": ComponentSource(class_name="AutoencoderKL", config={})}, InvalidFieldError, "configuration alone"
    ),
    "a directory outside": ({"vae": ComponentSource("/etc")}, SourceNotAllowedError, "may not read"),
    "a folder outside": ({"vae": ComponentSource("SD", "../../etc")}, SourceNotAllowedError, "leads out"),
    "no component there": ({"vae": ComponentSource("SD")}, NotAPipelineError, "no configuration file"),
    "no weights there": ({"vae": ComponentSource("EMPTY")}, NotAPipelineError, "no weight files"),
    "one bad of several": (
        {"controlnet": (ComponentSource("NET"), ComponentSource("SD", "vae"))}, InvalidFieldError, r"controlnet\[1\]"
    ),
    "another family's": ({"unett": None}, InvalidFieldError, "Did you mean 'unet'"),
}  # fmt: skip


@pytest.mark.parametrize(("bad", "error", "words"), BAD_OVERRIDES.values(), ids=BAD_OVERRIDES)
@pytest.mark.parametrize("how", ["load", "derive"])
def test_bad_overrides_leave_everything_as_it_was(
    driver: Driver,
    sd_checkpoint: Path,
    controlnets: tuple[Path, Path],
    checkpoint_dir: Path,
    how: str,
    bad: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    empty = checkpoint_dir / "empty-vae"
    empty.mkdir(exist_ok=True)
    shutil.copy(sd_checkpoint / "vae" / "config.json", empty)
    places = {"SD": str(sd_checkpoint), "NET": str(controlnets[0]), "EMPTY": str(empty)}

    def placed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(placed, value))
        if not isinstance(value, ComponentSource):
            return value
        return ComponentSource(
            places.get(value.repo_id, value.repo_id), value.subfolder, class_name=value.class_name, config=value.config
        )

    overrides = {role: placed(value) for role, value in bad.items()}
    driver.load("pipelines/a", sd_checkpoint)
    before = books(driver.snapshot())
    source = {"load": sd_checkpoint, "derive": "pipelines/a"}[how]
    with pytest.raises(error, match=words) as caught:
        getattr(driver, how)("pipelines/b", source, "image-to-image", overrides=overrides)
    assert getattr(caught.value, "hint", "")
    assert books(driver.snapshot()) == before


def test_a_family_without_controlnets_is_not_given_one(
    driver: Driver, sd_checkpoint: Path, controlnets: tuple[Path, Path]
) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    derive(driver, "pipelines/b", "pipelines/a", enable_pag=True)
    before = books(driver.snapshot())
    with pytest.raises(TaskNotSupportedError):
        driver.derive(
            "pipelines/c",
            "pipelines/b",
            "image-to-image",
            overrides={"controlnet": ComponentSource(str(controlnets[0])), "enable_pag": True},
        )
    assert books(driver.snapshot()) == before


def test_a_derivation_that_does_not_fit_is_refused_before_it_is_read(
    checkpoint_dir: Path, sd_checkpoint: Path, controlnets: tuple[Path, Path]
) -> None:
    probe = Driver(checkpoint_dir)
    probe.load("pipelines/a", sd_checkpoint)
    size = probe.snapshot().weight_bytes
    probe.close()
    driver = Driver(checkpoint_dir, budget=size + 1000)
    try:
        # What is pinned stays.
        spec = Recipe(Spec(str(sd_checkpoint), task="text-to-image"))
        driver.start(Load("pipelines/a", spec, keep=Keep(pinned=True))).result()
        before = books(driver.snapshot())
        source = ComponentSource(str(controlnets[0]))
        with pytest.raises(NoRoomError):
            derive(driver, "pipelines/b", "pipelines/a", controlnet=source)
        other = checkpoints.stable_diffusion(checkpoint_dir / "other-unet", seed=9)
        with pytest.raises(NoRoomError):
            derive(driver, "pipelines/b", "pipelines/a", unet=ComponentSource(str(other), "unet"))
        assert books(driver.snapshot()) == before
    finally:
        driver.close()

"""Pictures that say how they were made, and are made again from what they say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import denoised
import numpy as np
import pytest
from denoised import Adapter, manifest
from denoised.cli import app
from denoised.errors import InvalidMediaError
from diffusers import StableDiffusionPipeline
from PIL import Image
from typer.testing import CliRunner, Result

from tests import adapter_files
from tests.daemon import Daemon

ASKED: dict[str, Any] = {"num_inference_steps": 4, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def pipe(daemon: Daemon, sd_checkpoint: Path) -> Iterator[denoised.Pipeline]:
    with (
        daemon.client() as client,
        denoised.AutoPipelineForText2Image.from_pretrained(sd_checkpoint, client=client) as pipe,
    ):
        yield pipe


@pytest.fixture(scope="module")
def loras(checkpoint_dir: Path, sd_checkpoint: Path) -> Path:
    parts = StableDiffusionPipeline.from_pretrained(sd_checkpoint)
    folder = checkpoint_dir / "manifest-loras"
    adapter_files.lora(folder / "a.safetensors", unet=parts.unet, text_encoder=parts.text_encoder)
    return folder


def reproduce(daemon: Daemon, *arguments: object) -> Result:
    return CliRunner().invoke(app, ["reproduce", *map(str, arguments), "--target", daemon.target])


def test_a_result_says_how_it_was_made(pipe: denoised.Pipeline, sd_checkpoint: Path, loras: Path) -> None:
    result = pipe("a cat", seed=5, adapters=[Adapter(loras, 0.5, weight_name="a.safetensors")], **ASKED)
    said = result.manifest
    assert (said.pipeline_class, said.repo_id) == ("StableDiffusionPipeline", str(sd_checkpoint))
    assert (said.seeds, said.generator_device, said.device_kind) == ((5,), "cpu", "cpu")
    assert said.components == {role: part.digest for role, part in pipe.components.items() if part.digest}
    assert said.arguments == {"prompt": "a cat", **ASKED}
    assert list(said.adapters.values()) == [0.5]
    assert said.noise_scheduler is not None
    name, config = said.noise_scheduler
    assert (name, config["beta_start"]) == ("DDIMScheduler", 0.00085)
    assert {"diffusers", "torch", "transformers", "peft", "denoised"} <= set(said.library_versions)
    assert not said.joined
    assert manifest.Manifest.from_dict(json.loads(json.dumps(said.to_dict()))) == said


def test_each_picture_of_several_is_made_again(
    daemon: Daemon, pipe: denoised.Pipeline, loras: Path, tmp_path: Path
) -> None:
    adapters = [Adapter(loras, weight_name="a.safetensors")]
    result = pipe("a cat", adapters=adapters, num_images_per_prompt=2, embed_manifest=True, **ASKED)
    for index, (image, ending) in enumerate(zip(result.images, ("png", "webp"), strict=True)):
        path = tmp_path / f"{index}.{ending}"
        image.save(path, **({"lossless": True} if ending == "webp" else {}))
        with Image.open(path) as opened:
            embedded = manifest.read(opened)
        assert (embedded.index, embedded.manifest) == (index, result.manifest)
        again = reproduce(daemon, path, "-o", tmp_path / "again.png")
        assert again.exit_code == 0, again.output
        assert "bit for bit" in again.output
        with Image.open(tmp_path / "again.png") as made:
            np.testing.assert_array_equal(np.asarray(made), np.asarray(image))


def test_a_jpeg_knows_the_pixels_that_it_lost(daemon: Daemon, pipe: denoised.Pipeline, tmp_path: Path) -> None:
    pipe("a cat", embed_manifest=True, **ASKED).images[0].save(tmp_path / "a.jpg")
    again = reproduce(daemon, tmp_path / "a.jpg", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.output)["identical"]


def test_the_pipelines_settings_and_adapters_are_made_again_too(
    daemon: Daemon, sd_checkpoint: Path, loras: Path, tmp_path: Path
) -> None:
    picture = Image.effect_noise((64, 64), 60).convert("RGB")
    picture.save(tmp_path / "from.png")
    with (
        daemon.client() as client,
        denoised.AutoPipelineForText2Image.from_pretrained(sd_checkpoint, client=client) as source,
    ):
        source.load_lora_weights(loras, weight_name="a.safetensors", adapter_name="mine")
        with denoised.AutoPipelineForImage2Image.from_pipe(source) as derived:
            derived.set_adapters("mine", 0.4)
            made = derived("a dog", image=picture, strength=0.8, num_inference_steps=5, embed_manifest=True)
    assert made.manifest.loaded_adapters.keys() == {"mine"}
    made.images[0].save(tmp_path / "made.png")
    again = reproduce(daemon, tmp_path / "made.png", "--image", tmp_path / "from.png")
    assert again.exit_code == 0, again.output
    without = reproduce(daemon, tmp_path / "made.png")
    assert without.exit_code == 1
    assert "image" in without.output
    other = reproduce(daemon, tmp_path / "made.png", "--image", tmp_path / "made.png")
    assert other.exit_code == 1
    assert "not the one" in other.output


def test_what_was_joined_is_made_again_within_rounding(daemon: Daemon, pipe: denoised.Pipeline, tmp_path: Path) -> None:
    def ask(index: int) -> Any:
        return pipe("a cat", seed=index, embed_manifest=True, **(ASKED | {"num_inference_steps": 12}))

    joined = None
    for _ in range(5):
        with ThreadPoolExecutor(4) as threads:
            joined = next((result for result in threads.map(ask, range(4)) if result.manifest.joined), None)
        if joined is not None:
            break
    assert joined is not None, "equal requests at once are joined"
    joined.images[0].save(tmp_path / "joined.png")
    again = reproduce(daemon, tmp_path / "joined.png", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.output)["joined"]
    assert json.loads(again.output)["within_rounding"]


def test_what_differs_is_said(daemon: Daemon, pipe: denoised.Pipeline, tmp_path: Path) -> None:
    result = pipe("a cat", seed=1, **ASKED)
    changed = manifest.Manifest.from_dict(result.manifest.to_dict())
    changed.message.seeds[0] = 2
    changed.message.library_versions["torch"] = "0.1"
    changed.message.components[0].digest = "sha256:other"
    manifest.embed(result.images[0], changed, 0).save(tmp_path / "changed.png")
    again = reproduce(daemon, tmp_path / "changed.png")
    assert again.exit_code == 3, again.output
    assert "torch: 0.1 then" in again.output
    assert "sha256:other then" in again.output


def test_a_picture_without_a_manifest(daemon: Daemon, pipe: denoised.Pipeline, tmp_path: Path) -> None:
    result = pipe("a cat", embed_manifest=True, **ASKED)
    result.images[0].resize((32, 32)).save(tmp_path / "small.png")
    with Image.open(tmp_path / "small.png") as small, pytest.raises(InvalidMediaError):
        manifest.read(small)
    assert reproduce(daemon, tmp_path / "small.png").exit_code == 1

"""Checkpoints in one file, by both clients, against a real daemon."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path
from typing import Any

import denoised
import numpy as np
import pytest
import torch
from denoised import errors
from diffusers import StableDiffusionPipeline

from tests import single_file
from tests.daemon import Daemon

CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 3, "height": 64, "width": 64, "output_type": "np"}


@pytest.fixture(scope="module")
def file(checkpoint_dir: Path, sd_checkpoint: Path) -> Path:
    return single_file.save(sd_checkpoint, checkpoint_dir / "single" / "model.safetensors")


@pytest.fixture(scope="module")
def config(checkpoint_dir: Path, sd_checkpoint: Path) -> Path:
    """What describes the file, without weights."""
    no_weights = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(sd_checkpoint, checkpoint_dir / "single-config", ignore=no_weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_a_single_file_gives_what_diffusers_gives_and_is_held_once(
    daemon: Daemon, sdk: Any, held: Any, file: Path, config: Path, dtype: torch.dtype
) -> None:
    local = StableDiffusionPipeline.from_single_file(file, config=str(config), torch_dtype=dtype, local_files_only=True)
    local.set_progress_bar_config(disable=True)
    expected = local(generator=torch.Generator().manual_seed(1), **CALL).images
    async with sdk.Client(daemon.target, progress_bar=False) as client:
        pipe = await sdk.AutoPipelineForText2Image.from_single_file(
            file, config=config, torch_dtype=dtype, client=client
        )
        made = await pipe(seed=1, batching="forbid", **CALL)
        np.testing.assert_array_equal(made.images, expected)
        modules = (local.unet, local.vae, local.text_encoder)
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        size = held()
        assert size == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        again = await client.load(file.parent, single_file=file.name, config=config, dtype=dtype)
        assert type(pipe).__name__ == type(again).__name__
        assert again.info.pipeline_class == "StableDiffusionPipeline"
        painter = await sdk.AutoPipelineForImage2Image.from_single_file(
            file, config=denoised.Component(str(config)), torch_dtype=dtype, client=client
        )
        assert painter.info.pipeline_class == "StableDiffusionImg2ImgPipeline"
        assert held() == size
        assert {part.sharers for role, part in painter.components.items() if role in ("unet", "vae")} == {3}
        await pipe.unload()
        np.testing.assert_array_equal((await again(seed=1, batching="forbid", **CALL)).images, expected)


def test_a_pipeline_of_a_single_file_is_built_again_when_its_worker_dies(
    tmp_path: Path, checkpoint_dir: Path, file: Path, config: Path
) -> None:
    with Daemon(tmp_path, allow=[checkpoint_dir]) as running, running.client() as client:
        pipe = client.load(file.parent, single_file=file.name, config=config, task="text-to-image")
        before = pipe(seed=1, batching="forbid", **CALL).images
        digests = {role: part.digest for role, part in pipe.components.items()}
        running.workers()[0].send_signal(signal.SIGKILL)
        while not client.workers()[0].restart_count:
            time.sleep(0.05)
        np.testing.assert_array_equal(pipe(seed=1, batching="forbid", **CALL).images, before)
        assert {role: part.digest for role, part in pipe.components.items()} == digests
        spec = pipe.info.spec
        assert (spec.single_file, spec.config_source.repo_id) == (file.name, str(config))


def test_what_a_file_lacks_comes_from_the_folders_beside_the_configuration_or_is_given(
    daemon: Daemon, held: Any, checkpoint_dir: Path, sd_checkpoint: Path, file: Path, config: Path
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("cond_stage_model.")}
    partial = checkpoint_dir / "single" / "partial.safetensors"
    save_file(tensors, partial)
    with daemon.client() as client:
        whole = client.load(file.parent, single_file=file.name, config=config)
        expected = whole(seed=1, batching="forbid", **CALL).images
        with pytest.raises(errors.NotAPipelineError, match="text_encoder") as caught:
            client.load(partial.parent, single_file=partial.name, config=config)
        assert "denoised.CLIPTextModel.from_pretrained" in caught.value.hint
        encoder = denoised.CLIPTextModel.from_pretrained(sd_checkpoint, subfolder="text_encoder")
        for options in (
            {"config": sd_checkpoint},
            {"config": config, "overrides": {"text_encoder": encoder}},
        ):
            pipe = client.load(partial.parent, single_file=partial.name, **options)
            np.testing.assert_array_equal(pipe(seed=1, batching="forbid", **CALL).images, expected)


def test_what_cannot_be_read_is_refused_and_leaves_nothing(
    daemon: Daemon, held: Any, tmp_path: Path, checkpoint_dir: Path, file: Path, config: Path
) -> None:
    damaged = checkpoint_dir / "single" / "damaged.safetensors"
    damaged.write_bytes(file.read_bytes()[:-10])
    folder = file.parent
    with daemon.client() as client:
        good: dict[str, Any] = {"single_file": file.name, "config": config}
        for error, match, options in (
            (errors.RepoNotFoundError, "absent", good | {"single_file": "absent.safetensors"}),
            (errors.InvalidFieldError, "safetensors", good | {"single_file": "model.ckpt"}),
            (errors.SourceNotAllowedError, "leads out", good | {"single_file": "../single/model.safetensors"}),
            (errors.NotAPipelineError, "model_index", {"single_file": file.name}),
            (errors.DamagedWeightsError, "damaged", good | {"single_file": damaged.name}),
            (errors.SourceNotAllowedError, "may not read", good | {"config": tmp_path}),
            (errors.InvalidFieldError, "config_source", {"config": config}),
            (errors.InvalidFieldError, "no component of this name", good | {"dtype": {"vea": "fp16"}}),
            (errors.InvalidFieldError, "controlnet", good | {"overrides": {"controlnet": denoised.Component("demo")}}),
        ):
            with pytest.raises(error, match=match) as caught:
                client.load(folder, **options)
            assert caught.value.hint
            assert held() == 0
            assert client.workers()[0].memory.reserved_bytes == 0
        pipe = client.load(folder, single_file=file.name, config=config)
        with pytest.raises(errors.InvalidFieldError, match="single file"):
            client.load("demo", overrides={"vae": pipe.components["vae"]})


def test_weights_that_can_never_fit_are_refused_before_they_are_read(
    tmp_path: Path, checkpoint_dir: Path, file: Path, config: Path
) -> None:
    settings = tmp_path / "denoised.toml"
    settings.write_text('memory_budget = "1000000"\n')
    reports: list[Any] = []
    with (
        Daemon(tmp_path / "state", "--config", str(settings), allow=[checkpoint_dir]) as running,
        running.client() as client,
        pytest.raises(errors.NeverFitsError) as caught,
    ):
        client.load(file.parent, single_file=file.name, config=config, on_progress=reports.append)
    assert {report.phase for report in reports} <= {"waiting for a worker", "looking up"}
    # What is planned is what the components take, not what the file does.
    local = StableDiffusionPipeline.from_single_file(file, config=str(config), local_files_only=True)
    modules = (local.unet, local.vae, local.text_encoder)
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    assert int(caught.value.metadata["needed_bytes"]) == sum(each.numel() * each.element_size() for each in tensors)

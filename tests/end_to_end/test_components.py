"""Components given to remote pipelines, by both clients, against a real daemon."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import denoised
import numpy as np
import pytest
import torch
from denoised import errors
from diffusers import AutoPipelineForText2Image, ControlNetModel, DDPMScheduler
from PIL import Image

from tests import checkpoints
from tests.daemon import Daemon

CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 3, "height": 64, "width": 64, "output_type": "np"}
EDGES = Image.fromarray((np.indices((64, 64)).sum(0) % 16 * 16).astype("uint8")).convert("RGB")


@pytest.fixture(scope="module")
def net(checkpoint_dir: Path) -> Path:
    return checkpoints.controlnet(checkpoint_dir / "controlnet", seed=1)


async def test_a_controlnet_reference_on_load_and_on_derive(
    daemon: Daemon, sdk: Any, held: Any, sd_checkpoint: Path, net: Path
) -> None:
    local = AutoPipelineForText2Image.from_pretrained(sd_checkpoint, controlnet=ControlNetModel.from_pretrained(net))
    local.set_progress_bar_config(disable=True)
    expected = local(image=EDGES, generator=torch.Generator().manual_seed(1), **CALL).images
    async with sdk.Client(daemon.target, progress_bar=False) as client:
        controlnet = denoised.ControlNetModel.from_pretrained(net)
        auto = sdk.AutoPipelineForText2Image
        loaded = await auto.from_pretrained(sd_checkpoint, controlnet=controlnet, client=client)
        size = held()
        plain = await auto.from_pretrained(sd_checkpoint, client=client)
        derived = await auto.from_pipe(plain, controlnet=controlnet)
        without = await auto.from_pipe(derived, controlnet=None)
        assert held() == size
        assert [pipe.info.pipeline_class for pipe in (loaded, derived, without)] == [
            "StableDiffusionControlNetPipeline",
            "StableDiffusionControlNetPipeline",
            "StableDiffusionPipeline",
        ]
        await plain.unload()
        for pipe in (loaded, derived):
            made = await pipe(image=EDGES, seed=1, batching="forbid", **CALL)
            np.testing.assert_array_equal(made.images, expected)


async def test_a_part_of_one_pipeline_is_given_to_another(
    daemon: Daemon, sdk: Any, held: Any, checkpoint_dir: Path, sd_checkpoint: Path, net: Path
) -> None:
    other = checkpoints.stable_diffusion(checkpoint_dir / "other-components", seed=7)
    async with sdk.Client(daemon.target, progress_bar=False) as client:
        auto = sdk.AutoPipelineForText2Image
        nets = [denoised.ControlNetModel.from_pretrained(net)] * 2
        first = await auto.from_pretrained(other, controlnet=nets, client=client)
        size, parts = held(), first.components
        second = await auto.from_pretrained(
            sd_checkpoint, unet=parts["unet"], controlnet=parts["controlnet"], client=client
        )
        assert held() == size
        assert second.components["unet"].digest == parts["unet"].digest
        assert second.components["controlnet[1]"].digest == parts["controlnet[0]"].digest
        assert second.components["unet"].sharers == 2
        third = await auto.from_pipe(second, vae=parts["vae"], controlnet=parts["controlnet[0]"])
        assert held() == size
        assert third.info.pipeline_class == "StableDiffusionControlNetPipeline"
        # Where it came from, not what it was taken from: the source may go.
        assert second.info.spec.overrides["unet"].component.repo_id == str(other)
        await first.unload()
        await second.unload()
        result = await third(image=EDGES, seed=1, **CALL)
        assert result.images.shape == (1, 64, 64, 3)
        with pytest.raises(errors.PipelineNotFoundError):
            await auto.from_pretrained(sd_checkpoint, unet=parts["unet"], client=client)


async def test_noise_schedulers_as_objects_and_as_references(
    daemon: Daemon, sdk: Any, held: Any, sd_checkpoint: Path
) -> None:
    local = AutoPipelineForText2Image.from_pretrained(sd_checkpoint)
    local.scheduler = DDPMScheduler.from_config(local.scheduler.config, timestep_spacing="trailing")
    local.set_progress_bar_config(disable=True)
    expected = local(generator=torch.Generator().manual_seed(1), **CALL).images
    references = (
        local.scheduler,
        denoised.DDPMScheduler.from_config(local.scheduler.config),
        denoised.DDPMScheduler.from_pretrained(sd_checkpoint, subfolder="scheduler", timestep_spacing="trailing"),
    )
    async with sdk.Client(daemon.target, progress_bar=False) as client:
        plain = await sdk.AutoPipelineForText2Image.from_pretrained(sd_checkpoint, client=client)
        untouched = await plain(seed=1, batching="forbid", **CALL)
        for scheduler in references:
            pipe = await sdk.AutoPipelineForText2Image.from_pipe(plain, scheduler=scheduler)
            assert pipe.components["scheduler"].class_name == "DDPMScheduler"
            made = await pipe(seed=1, batching="forbid", **CALL)
            np.testing.assert_array_equal(made.images, expected)
        again = await plain(seed=1, batching="forbid", **CALL)
        np.testing.assert_array_equal(again.images, untouched.images)


def test_what_a_derivation_brought_is_built_again_after_a_death(
    tmp_path: Path, checkpoint_dir: Path, sd_checkpoint: Path, net: Path
) -> None:
    with Daemon(tmp_path, allow=[checkpoint_dir]) as running, running.client() as client:
        plain = denoised.AutoPipelineForText2Image.from_pretrained(sd_checkpoint, client=client)
        pipe = denoised.AutoPipelineForText2Image.from_pipe(
            plain,
            controlnet=[denoised.ControlNetModel.from_pretrained(net)],
            vae=plain.components["vae"],
            scheduler=denoised.DDPMScheduler.from_config({"beta_schedule": "linear"}),
        )
        plain.unload()
        before = pipe(image=[EDGES], seed=1, batching="forbid", **CALL).images
        digests = {part.role: part.digest for part in pipe.components.values()}
        held = client.workers()[0].memory.weight_bytes
        running.workers()[0].send_signal(signal.SIGKILL)
        while not client.workers()[0].restart_count:
            time.sleep(0.05)
        np.testing.assert_array_equal(pipe(image=[EDGES], seed=1, batching="forbid", **CALL).images, before)
        assert {part.role: part.digest for part in pipe.components.values()} == digests
        assert client.workers()[0].memory.weight_bytes == held


def test_a_local_module_is_refused_before_anything_is_sent(daemon: Daemon, sd_checkpoint: Path) -> None:
    with daemon.client() as client:
        with pytest.raises(errors.UnsupportedError, match=r"denoised\.AutoencoderKL\.from_pretrained"):
            denoised.AutoPipelineForText2Image.from_pretrained(sd_checkpoint, vae=checkpoints.tiny_vae(), client=client)
        assert client.pipelines() == []

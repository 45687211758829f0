"""Adapters through the daemon against diffusers in this process: the same file, diffusers' own calls."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import denoised
import numpy as np
import pytest
import torch
from denoised import Adapter
from denoised.errors import (
    AdapterMismatchError,
    AdapterNotFoundError,
    InvalidFieldError,
    InvalidRequestError,
    WorkerLostError,
)
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from tests import adapter_files, checkpoints
from tests.daemon import Daemon

from .checkpoints import encoders, tokenizers
from .checkpoints.weights import filled

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


Steps = Callable[[Any], object]


def same(steps: Sequence[Steps], remote: Any, pipe: Any, **more: Any) -> None:
    """Each step done here and there, and after each the same bits."""
    for number, step in enumerate(steps):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step(pipe)
        step(remote)
        asked = {"prompt": f"a cat {number}", **ASKED, **more}
        here = pipe(**asked, generator=seeded(number)).images
        there = remote(**asked, seed=number, batching="forbid").images
        np.testing.assert_array_equal(there, here, err_msg=f"after step {number}")


def load(folder: Path, name: str, **more: Any) -> Steps:
    return lambda pipe: pipe.load_lora_weights(folder, weight_name=f"{name}.safetensors", **more)


@pytest.fixture
def fresh(daemon: Daemon, sd_checkpoint: Path) -> Iterator[denoised.Pipeline]:
    with (
        daemon.client() as client,
        denoised.AutoPipelineForText2Image.from_pretrained(sd_checkpoint, client=client) as pipe,
    ):
        yield pipe


def test_a_pipelines_own_loras_are_those_of_diffusers(
    fresh: denoised.Pipeline, remote: denoised.Pipeline, sd_checkpoint: Path, loras: Path
) -> None:
    before = remote("a", seed=1, batching="forbid", **ASKED).images
    pipe = local(sd_checkpoint)
    weights = fresh.memory
    same(
        [
            load(loras, "a", adapter_name="first"),
            lambda pipe: pipe.set_adapters("first", 0.5),
            load(loras, "b", adapter_name="second"),
            lambda pipe: pipe.set_adapters(["first", "second"], adapter_weights=[0.3, {"unet": 0.9}]),
            lambda pipe: pipe.disable_lora(),
            lambda pipe: pipe.enable_lora(),
            lambda pipe: pipe.delete_adapters("second"),
        ],
        fresh,
        pipe,
    )
    assert fresh.get_active_adapters() == pipe.get_active_adapters() == ["first"]
    assert fresh.get_list_adapters() == pipe.get_list_adapters()
    assert fresh.memory.exclusive_bytes > 0, "nobody else has loaded these"
    np.testing.assert_array_equal(remote("a", seed=1, batching="forbid", **ASKED).images, before)
    # For one call, by name.
    there = fresh("a", adapters={"first": 0.7}, seed=3, batching="forbid", **ASKED).images
    np.testing.assert_array_equal(there, expected_named(sd_checkpoint, loras, {"a": 0.7}, "a", 3))
    same([lambda pipe: pipe.unload_lora_weights()], fresh, pipe)
    assert fresh.memory == weights
    assert fresh.get_list_adapters() == {}


def expected_named(sd_checkpoint: Path, loras: Path, scales: dict[str, float], prompt: str, seed: int) -> Any:
    pipe = local(sd_checkpoint)
    for name in scales:
        pipe.load_lora_weights(loras, weight_name=f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters([*scales], [*scales.values()])
    return pipe(prompt, generator=seeded(seed), **ASKED).images


def test_fusing_gives_a_pipeline_weights_of_its_own(
    fresh: denoised.Pipeline, remote: denoised.Pipeline, sd_checkpoint: Path, loras: Path
) -> None:
    before = remote("a", seed=1, batching="forbid", **ASKED).images
    same(
        [
            load(loras, "a", adapter_name="first"),
            load(loras, "b", adapter_name="second"),
            lambda pipe: pipe.set_adapters(["first", "second"], [0.5, 0.8]),
            lambda pipe: pipe.fuse_lora(lora_scale=0.7, adapter_names=["first"]),
            lambda pipe: pipe.unfuse_lora(),
            lambda pipe: pipe.fuse_lora(components=["unet"]),
            lambda pipe: pipe.unload_lora_weights(),
            load(loras, "b", adapter_name="third"),
        ],
        fresh,
        local(sd_checkpoint),
    )
    assert fresh.memory.exclusive_bytes > 100_000
    np.testing.assert_array_equal(remote("a", seed=1, batching="forbid", **ASKED).images, before)


def test_textual_inversion(
    fresh: denoised.Pipeline, remote: denoised.Pipeline, sd_checkpoint: Path, loras: Path
) -> None:
    asked: dict[str, Any] = {"prompt": "a <thing> and [other]"}
    before = remote(**asked, seed=1, batching="forbid", **ASKED).images
    adapter_files.textual_inversion(loras / "thing.safetensors", "<thing>")
    adapter_files.textual_inversion(loras / "other.safetensors", "anything", vectors=3, seed=1)
    adapter_files.textual_inversion(loras / "wide.safetensors", "<wide>", width=48)
    pipe = local(sd_checkpoint)
    same(
        [
            lambda pipe: pipe.load_textual_inversion(loras, weight_name="thing.safetensors"),
            lambda pipe: pipe.load_textual_inversion(loras, weight_name="other.safetensors", token="[other]"),
            load(loras, "a"),
            lambda pipe: pipe.unload_textual_inversion("<thing>"),
            lambda pipe: pipe.unload_lora_weights(),
        ],
        fresh,
        pipe,
        **asked,
    )
    for name in ("wide", "other"):
        with pytest.raises(AdapterMismatchError):
            fresh.load_textual_inversion(loras, weight_name=f"{name}.safetensors", token="[other]")
    same([lambda pipe: None, lambda pipe: pipe.unload_textual_inversion()], fresh, pipe, **asked)
    np.testing.assert_array_equal(remote(**asked, seed=1, batching="forbid", **ASKED).images, before)


def test_an_ip_adapter(
    fresh: denoised.Pipeline, remote: denoised.Pipeline, sd_checkpoint: Path, checkpoint_dir: Path, loras: Path
) -> None:
    before = remote("a", seed=1, batching="forbid", **ASKED).images
    pipe = local(sd_checkpoint)
    folder = adapter_files.ip_adapter(checkpoint_dir / "ip" / "models", pipe.unet).parent
    picture = Image.effect_noise((48, 40), 80).convert("RGB")
    weights = fresh.memory.exclusive_bytes, fresh.memory.shared_bytes
    same(
        [
            lambda pipe: pipe.load_ip_adapter(folder, "models", "ip-adapter.safetensors"),
            lambda pipe: pipe.set_ip_adapter_scale(0.5),
            lambda pipe: pipe.set_ip_adapter_scale({"up": {"block_1": [0.0, 1.0]}}),
            load(loras, "a"),
        ],
        fresh,
        pipe,
        ip_adapter_image=picture,
    )
    assert fresh.memory.exclusive_bytes > 0
    with pytest.raises(InvalidRequestError):
        fresh("a", **ASKED)
    same([lambda pipe: pipe.unload_ip_adapter(), lambda pipe: pipe.unload_lora_weights()], fresh, pipe)
    assert (fresh.memory.exclusive_bytes, fresh.memory.shared_bytes) == weights
    np.testing.assert_array_equal(remote("a", seed=1, batching="forbid", **ASKED).images, before)


def test_an_ip_adapter_without_its_image_encoder(
    fresh: denoised.Pipeline, sd_checkpoint: Path, checkpoint_dir: Path
) -> None:
    pipe = local(sd_checkpoint)
    folder = adapter_files.ip_adapter(checkpoint_dir / "ip-alone", pipe.unet)
    weights, before = fresh.memory, fresh("a", seed=1, batching="forbid", **ASKED).images
    with pytest.raises(AdapterMismatchError, match="image encoder") as caught:
        fresh.load_ip_adapter(folder, "", "ip-adapter.safetensors", image_encoder_folder="nowhere")
    assert "image_encoder_folder" in caught.value.hint
    assert fresh.refresh().memory == weights
    np.testing.assert_array_equal(fresh("a", seed=1, batching="forbid", **ASKED).images, before)
    same(
        [
            lambda pipe: pipe.load_ip_adapter(
                folder, subfolder="", weight_name="ip-adapter.safetensors", image_encoder_folder=None
            )
        ],
        fresh,
        pipe,
        ip_adapter_image_embeds=[torch.randn(2, 1, 32, generator=seeded(0))],
    )


def test_what_is_derived_starts_with_the_adapters_and_goes_its_own_way(
    fresh: denoised.Pipeline, sd_checkpoint: Path, loras: Path
) -> None:
    fresh.load_lora_weights(loras, weight_name="a.safetensors", adapter_name="first")
    with denoised.AutoPipelineForImage2Image.from_pipe(fresh) as derived:
        assert derived.get_active_adapters() == ["first"]
        fresh.unload_lora_weights()
        assert derived.refresh().get_active_adapters() == ["first"]
        pipe = StableDiffusionImg2ImgPipeline.from_pretrained(sd_checkpoint)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(loras, weight_name="a.safetensors")
        asked: dict[str, Any] = {
            "prompt": "a",
            "image": Image.new("RGB", (64, 64), "red"),
            "strength": 0.7,
            "output_type": "np",
        }
        here = pipe(**asked, num_inference_steps=5, generator=seeded(1)).images
        there = derived(**asked, num_inference_steps=5, seed=1, batching="forbid").images
        np.testing.assert_array_equal(there, here)


def test_adapters_survive_the_worker(tmp_path: Path, sd_checkpoint: Path, checkpoint_dir: Path, loras: Path) -> None:
    with (
        Daemon(tmp_path, allow=[checkpoint_dir]) as daemon,
        daemon.client() as client,
        denoised.AutoPipelineForText2Image.from_pretrained(sd_checkpoint, client=client) as pipe,
    ):
        pipe.load_lora_weights(loras, weight_name="a.safetensors", adapter_name="first")
        pipe.set_adapters("first", 0.5)
        before = pipe("a", seed=1, batching="forbid", **ASKED).images
        (worker,) = daemon.workers()
        worker.kill()
        with contextlib.suppress(WorkerLostError):
            # The first may have been on its way when the worker died.
            pipe("a", **ASKED)
        np.testing.assert_array_equal(pipe("a", seed=1, batching="forbid", **ASKED).images, before)
        np.testing.assert_array_equal(before, expected_named(sd_checkpoint, loras, {"a": 0.5}, "a", 1))
        assert pipe.refresh().get_active_adapters() == ["first"]


@pytest.fixture(scope="module")
def flux_checkpoint(checkpoint_dir: Path) -> Path:
    torch.manual_seed(0)
    clip, t5 = tokenizers.clip(), tokenizers.t5()
    folder = checkpoint_dir / "flux"
    FluxPipeline(
        transformer=filled(
            FluxTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                axes_dims_rope=(4, 4, 8),
            )
        ),
        text_encoder=encoders.clip_text(clip),
        text_encoder_2=encoders.t5(t5),
        tokenizer=clip,
        tokenizer_2=t5,
        vae=checkpoints.tiny_vae(shift_factor=0.1, scaling_factor=1.5),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)
    return folder


def test_loras_of_a_transformer(daemon: Daemon, flux_checkpoint: Path, checkpoint_dir: Path) -> None:
    pipe = FluxPipeline.from_pretrained(flux_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    folder = checkpoint_dir / "flux-loras"
    adapter_files.lora(folder / "a.safetensors", transformer=pipe.transformer, text_encoder=pipe.text_encoder)
    adapter_files.lora(folder / "b.safetensors", transformer=pipe.transformer, seed=1, names=["ff.net.2"])
    with (
        daemon.client() as client,
        denoised.AutoPipelineForText2Image.from_pretrained(flux_checkpoint, client=client) as remote,
    ):
        asked: dict[str, Any] = {"max_sequence_length": 16}
        before = remote("a", seed=1, batching="forbid", **ASKED, **asked).images
        for_one_call = remote(
            "a cat 1",
            seed=1,
            adapters=[Adapter(folder, 0.5, weight_name="b.safetensors"), Adapter(folder, weight_name="a.safetensors")],
            batching="forbid",
            **ASKED,
            **asked,
        ).images
        steps: list[Steps] = [
            load(folder, "a", adapter_name="first"),
            lambda pipe: (
                pipe.load_lora_weights(folder, weight_name="b.safetensors", adapter_name="second"),
                pipe.set_adapters(["second", "first"], [0.5, 1.0]),
            ),
        ]
        same(steps, remote, pipe, **asked)
        here = pipe("a cat 1", generator=seeded(1), **ASKED, **asked).images
        np.testing.assert_array_equal(for_one_call, here)
        fusing: list[Steps] = [lambda pipe: pipe.fuse_lora(), lambda pipe: pipe.unload_lora_weights()]
        same(fusing, remote, pipe, **asked)
        with denoised.AutoPipelineForText2Image.from_pretrained(flux_checkpoint, client=client) as other:
            np.testing.assert_array_equal(other("a", seed=1, batching="forbid", **ASKED, **asked).images, before)


def test_textual_inversion_of_the_second_text_encoder(
    daemon: Daemon, sdxl_checkpoint: Path, checkpoint_dir: Path
) -> None:
    folder = checkpoint_dir / "xl-inversions"
    adapter_files.textual_inversion(folder / "thing.safetensors", "<thing>")
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    with (
        daemon.client() as client,
        denoised.AutoPipelineForText2Image.from_pretrained(sdxl_checkpoint, client=client) as remote,
    ):
        asked: dict[str, Any] = {"prompt": "a <thing>", "prompt_2": "one <thing>"}
        same([lambda pipe: None], remote, pipe, **asked)
        pipe.load_textual_inversion(
            folder, weight_name="thing.safetensors", tokenizer=pipe.tokenizer_2, text_encoder=pipe.text_encoder_2
        )
        remote.load_textual_inversion(
            folder, weight_name="thing.safetensors", tokenizer="tokenizer_2", text_encoder="text_encoder_2"
        )
        same([lambda pipe: None], remote, pipe, **asked)

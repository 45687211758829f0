"""Quantised loads, against diffusers in this process."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import denoised
import diffusers
import numpy as np
import pytest
import torch
import transformers
from denoised import errors

from tests import adapter_files
from tests.daemon import Daemon

CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 3, "height": 64, "width": 64, "output_type": "np"}
INT8 = {"quant_method": "quanto", "weights_dtype": "int8"}
Auto = denoised.AutoPipelineForText2Image


def installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


needs_quanto = pytest.mark.skipif(not installed("optimum-quanto"), reason="optimum-quanto is not installed")
needs_torchao = pytest.mark.skipif(not installed("torchao"), reason="torchao is not installed")


@pytest.fixture
def client(daemon: Daemon, held: object) -> Iterator[denoised.Client]:
    """In the end the daemon holds as much as in the beginning, which is nothing."""
    with daemon.client() as client:
        yield client
        for pipe in client.pipelines():
            pipe.unload()
        memory = client.workers()[0].memory
        assert memory.weight_bytes == memory.reserved_bytes == 0


def assert_nothing_is_left(client: denoised.Client) -> None:
    """The daemon clears away what it began after it has said how the load failed."""
    end = time.monotonic() + 10
    while client.pipelines() and time.monotonic() < end:
        time.sleep(0.01)
    memory = client.workers()[0].memory
    assert client.pipelines() == []
    assert memory.weight_bytes == memory.reserved_bytes == 0


def torchao_int8() -> Any:
    return importlib.import_module("torchao.quantization").Int8WeightOnlyConfig()


def local(checkpoint: Path, mapping: dict[str, Any]) -> Any:
    pipe = diffusers.AutoPipelineForText2Image.from_pretrained(
        checkpoint,
        torch_dtype=torch.float32,
        quantization_config=diffusers.PipelineQuantizationConfig(quant_mapping=mapping),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe: Any) -> Any:
    return pipe(generator=torch.Generator().manual_seed(1), **CALL).images


def expected(checkpoint: Path, mapping: dict[str, Any]) -> Any:
    return pictures(local(checkpoint, mapping))


@needs_quanto
def test_quanto_makes_the_pictures_that_diffusers_makes(client: denoised.Client, sd_checkpoint: Path) -> None:
    mapping = {
        "unet": diffusers.QuantoConfig(weights_dtype="int8"),
        "text_encoder": transformers.QuantoConfig(weights="int8"),
    }
    plain = Auto.from_pretrained(sd_checkpoint, client=client)
    pipe = Auto.from_pretrained(sd_checkpoint, quantization_config=mapping, client=client)
    images = pipe(seed=1, batching="forbid", **CALL).images
    np.testing.assert_array_equal(images, expected(sd_checkpoint, mapping))
    assert not np.array_equal(images, plain(seed=1, batching="forbid", **CALL).images)
    derived = denoised.AutoPipelineForImage2Image.from_pipe(pipe)
    assert derived.components["unet"].digest == pipe.components["unet"].digest


@needs_torchao
def test_torchao_makes_the_pictures_that_diffusers_makes(client: denoised.Client, sd_checkpoint: Path) -> None:
    int8 = torchao_int8()
    mapping = {"unet": diffusers.TorchAoConfig(int8)}
    pipe = Auto.from_pretrained(sd_checkpoint, quantization_config=mapping, client=client)
    np.testing.assert_array_equal(pipe(seed=1, batching="forbid", **CALL).images, expected(sd_checkpoint, mapping))


@needs_quanto
def test_quantised_components_are_smaller_and_shared_only_among_each_other(
    client: denoised.Client, sd_checkpoint: Path
) -> None:
    backend = {"quant_backend": "quanto", "quant_kwargs": {"weights_dtype": "int8"}, "components_to_quantize": "unet"}
    plain = Auto.from_pretrained(sd_checkpoint, client=client).components
    one = Auto.from_pretrained(sd_checkpoint, quantization_config={"unet": INT8}, client=client).components
    held = client.workers()[0].memory.weight_bytes
    other = Auto.from_pretrained(sd_checkpoint, quantization_config=backend, client=client).components
    assert client.workers()[0].memory.weight_bytes == held
    assert one["unet"].digest == other["unet"].digest != plain["unet"].digest
    assert one["vae"].digest == plain["vae"].digest
    assert one["unet"].weight_bytes < plain["unet"].weight_bytes
    with pytest.raises(errors.InvalidFieldError, match="is quantised"):
        Auto.from_pretrained(sd_checkpoint, unet=one["unet"], client=client)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(lambda: diffusers.QuantoConfig(weights_dtype="int8"), id="quanto", marks=needs_quanto),
        pytest.param(lambda: diffusers.TorchAoConfig(torchao_int8()), id="torchao", marks=needs_torchao),
    ],
)
def test_adapters_go_beside_quantised_weights_as_in_diffusers(
    client: denoised.Client, sd_checkpoint: Path, checkpoint_dir: Path, config: Callable[[], Any]
) -> None:
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd_checkpoint, subfolder="unet")
    file = adapter_files.lora(checkpoint_dir / "onto-quantised" / "lora.safetensors", unet=unet)
    here = local(sd_checkpoint, {"unet": config()})
    bare = pictures(here)
    here.load_lora_weights(file, adapter_name="style")
    adapted = pictures(here)
    here.set_adapters("style", 0.5)
    half = pictures(here)
    assert not np.array_equal(bare, adapted)
    assert not np.array_equal(adapted, half)

    pipe = Auto.from_pretrained(sd_checkpoint, quantization_config={"unet": config()}, client=client)
    held = client.workers()[0].memory.weight_bytes

    def made(**options: Any) -> Any:
        return pipe(seed=1, batching="forbid", **CALL, **options).images

    np.testing.assert_array_equal(made(), bare)
    adapter = denoised.Adapter(file.parent, weight_name=file.name)
    np.testing.assert_array_equal(made(adapters=[adapter]), adapted)
    np.testing.assert_array_equal(made(), bare)
    pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name="style")
    np.testing.assert_array_equal(made(), adapted)
    pipe.set_adapters("style", 0.5)
    np.testing.assert_array_equal(made(), half)
    with pytest.raises(errors.AdapterMismatchError, match="fuse_lora does not work on a unet that is quantised"):
        pipe.fuse_lora()
    np.testing.assert_array_equal(made(), half)
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(made(), bare)
    assert client.workers()[0].memory.weight_bytes < held + 2 * file.stat().st_size


REFUSED = [
    pytest.param({"unet": {"quant_method": "gguf"}}, "format of files", id="gguf"),
    pytest.param(
        {"unet": {"quant_method": "bitsandbytes_8bit", "load_in_8bit": True}},
        "bitsandbytes_8bit here",
        id="bitsandbytes",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="bitsandbytes may run here"),
    ),
    pytest.param(
        {"unet": {**INT8, "weights_dtype": "int4"}}, "compiles an extension", id="quanto-int4", marks=needs_quanto
    ),
    pytest.param(
        {"unet": INT8},
        "quanto here",
        id="quanto",
        marks=pytest.mark.skipif(installed("optimum-quanto"), reason="optimum-quanto is installed"),
    ),
    pytest.param(
        {"unet": {"quant_method": "torchao", "quant_type": {"default": {}}}},
        "torchao here",
        id="torchao",
        marks=pytest.mark.skipif(installed("torchao"), reason="torchao is installed"),
    ),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_a_backend_that_is_missing_here_is_said_to_be(
    client: denoised.Client, sd_checkpoint: Path, config: Any, message: str
) -> None:
    with pytest.raises(errors.QuantizationUnavailableError, match=message) as caught:
        Auto.from_pretrained(sd_checkpoint, quantization_config=config, client=client)
    assert caught.value.hint
    assert_nothing_is_left(client)


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ({"unett": INT8}, "Did you mean 'unet'"),
        ({"scheduler": INT8}, "Use one of"),
        pytest.param(
            {"unet": {**INT8, "weights_dtype": "int3"}}, "of diffusers takes weights_dtype", marks=needs_quanto
        ),
        pytest.param({"unet": {**INT8, "weight_dtype": "int8"}}, "Did you mean 'weights_dtype'", marks=needs_quanto),
        pytest.param({"text_encoder": INT8}, "Did you mean 'weights'", marks=needs_quanto),
    ],
)
def test_what_no_backend_can_do_is_refused_with_a_hint(
    client: denoised.Client, sd_checkpoint: Path, config: Any, hint: str
) -> None:
    with pytest.raises(errors.InvalidFieldError, match=hint):
        Auto.from_pretrained(sd_checkpoint, quantization_config=config, client=client)
    assert_nothing_is_left(client)

"""Callbacks, noise schedulers, features, prompts and what is seen of a pipeline: one program, both SDKs."""

from __future__ import annotations

import asyncio
import builtins
import copy
import inspect
import pickle
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import denoised
import denoised.aio
import diffusers
import numpy as np
import pytest
import torch
from denoised import errors, media, values
from denoised.callbacks import Callbacks
from denoised.config import FrozenDict
from denoised.v1 import generation_service_pb2 as pb
from denoised.v1 import pipeline_service_pb2
from diffusers import callbacks
from PIL import Image

from tests.unit.both_sdks import AsyncSdk, BlockingSdk
from tests.unit.fake_daemon import FakeDaemon


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    with FakeDaemon() as daemon:
        yield daemon


@pytest.fixture(params=[AsyncSdk, BlockingSdk])
def sdk(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture
async def client(sdk: Any, daemon: FakeDaemon) -> AsyncIterator[Any]:
    async with sdk.Client(daemon.target, progress_bar=False) as client:
        yield client


@pytest.fixture
async def pipe(sdk: Any, client: Any) -> Any:
    return await sdk.AutoPipelineForText2Image.from_pretrained("demo", client=client)


def tensors(reply: Any) -> dict[str, Any]:
    return {name: media.unpack(values.from_proto(value)) for name, value in reply.tensors.items()}


# Callbacks


async def test_a_callback_gets_what_diffusers_gives_it(pipe: Any, daemon: FakeDaemon) -> None:
    seen: list[Any] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((type(pipe).__name__, pipe.guidance_scale, step, timestep, tensors["latents"].unique().item()))
        return tensors

    result = await pipe("an apple", num_inference_steps=3, callback_on_step_end=callback)
    assert seen == [("StableDiffusionPipeline", 7.5, step, 999 - step, step) for step in range(3)]
    assert all(not reply.tensors and not reply.state for reply in daemon.replies), "nothing that did not change is sent"
    assert isinstance(result.images[0], Image.Image)


async def test_what_a_callback_changes_has_effect(pipe: Any, daemon: FakeDaemon) -> None:
    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any] | None:
        if step == 0:
            return {"latents": tensors["latents"] + 5, "others": 1}
        if step == 1:
            tensors["latents"].add_(7)
            pipe._guidance_scale = 0.0
            assert pipe._guidance_scale == 0.0
        if step == 2:
            pipe._guidance_scale = 3.0
        return None

    inputs = ["latents", "prompt_embeds"]
    await pipe(
        "an apple", num_inference_steps=3, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=inputs
    )
    assert [{name: x.unique().item() for name, x in tensors(reply).items()} for reply in daemon.replies] == [
        {"latents": 5},
        {"latents": 8},
        {},
    ]
    assert not daemon.replies[0].state
    assert daemon.replies[1].state["_guidance_scale"].double_value == 0.0
    assert getattr(pipe, "inner", pipe)._guidance_scale == 3.0, "what the last one set stays, as in diffusers"


async def test_setting_interrupt_stops_the_loop_and_keeps_what_there_is(pipe: Any, daemon: FakeDaemon) -> None:
    def callback(seen: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen._interrupt = step == 2
        return tensors

    result = await pipe("an apple", num_inference_steps=500, callback_on_step_end=callback)
    assert len(daemon.replies) == 3
    assert result.images


async def test_a_callback_may_also_set_it_on_the_pipeline_that_was_called(pipe: Any, daemon: FakeDaemon) -> None:
    called = getattr(pipe, "inner", pipe)

    def callback(seen: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        called._interrupt = True
        return tensors

    await pipe("an apple", num_inference_steps=500, callback_on_step_end=callback)
    assert len(daemon.replies) == 1


async def test_a_callback_that_is_only_told_can_stop_it_too(pipe: Any, daemon: FakeDaemon) -> None:
    daemon.step_seconds = 0.02

    def callback(seen: Any, *_: Any) -> None:
        seen._interrupt = True

    with pytest.raises(errors.GenerationInterruptedError):
        await pipe(
            "an apple",
            num_inference_steps=1000,
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=[],
        )
    assert await asyncio.to_thread(daemon.cancelled.wait, 10)


async def test_what_a_callback_raises_ends_the_conversation(pipe: Any, daemon: FakeDaemon) -> None:
    def callback(*_: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await pipe("an apple", num_inference_steps=1000, callback_on_step_end=callback)
    assert await asyncio.to_thread(daemon.cancelled.wait, 10)


async def test_diffusers_own_callback_classes_bring_their_tensors(pipe: Any, daemon: FakeDaemon) -> None:
    cutoff = callbacks.SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    several = callbacks.MultiPipelineCallbacks([cutoff])
    for callback in (cutoff, several):
        daemon.replies.clear()
        await pipe("an apple", num_inference_steps=3, callback_on_step_end=callback)
        assert [sorted(tensors(reply)) for reply in daemon.replies] == [[], [], []]  # one row stays one row
        assert [reply.state["_guidance_scale"].double_value for reply in daemon.replies if reply.state] == [0.0]


async def test_the_older_callback_has_its_period(pipe: Any, daemon: FakeDaemon) -> None:
    seen: list[Any] = []
    await pipe(
        "an apple",
        num_inference_steps=4,
        callback=lambda step, timestep, latents: seen.append((step, timestep, latents.shape)),
        callback_steps=2,
    )
    assert seen == [(step, 999 - step, (1, 4, 2, 2)) for step in (0, 2)]


async def test_what_is_no_callback_is_refused(pipe: Any) -> None:
    with pytest.raises(errors.InvalidFieldError, match="a int cannot be called"):
        await pipe("an apple", callback_on_step_end=3)


def test_without_torch_tensors_are_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    bfloat16 = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)
    event = pb.StepEnd(callback="callback_on_step_end")
    event.tensors["latents"].CopyFrom(values.to_proto(media.pack(bfloat16)))
    seen: list[Any] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"])
        return {"latents": tensors["latents"] * 2}

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    step = Callbacks({"callback_on_step_end": callback}).at(event)
    reply = step.reply(step.run(None), interrupt=False).reply
    assert isinstance(seen[0], np.ndarray)
    np.testing.assert_array_equal(seen[0], [[1.5, -2.0]])
    np.testing.assert_array_equal(tensors(reply)["latents"], [[3.0, -4.0]])
    same = Callbacks({"callback_on_step_end": lambda *args: args[-1]}).at(event)
    assert not same.reply(same.run(None), interrupt=False).reply.tensors


# Noise schedulers


@pytest.mark.parametrize(
    ("scheduler", "class_name", "steps_offset"),
    [
        ("EulerDiscreteScheduler", "EulerDiscreteScheduler", 1),
        ({"steps_offset": 3}, "DDIMScheduler", 3),
        (("PNDMScheduler", {"steps_offset": 4}), "PNDMScheduler", 4),
        (diffusers.DDIMScheduler(steps_offset=5), "DDIMScheduler", 5),
        (diffusers.PNDMScheduler, "PNDMScheduler", 1),
        (diffusers.DDIMScheduler(trained_betas=np.linspace(0.1, 0.2, 3)), "DDIMScheduler", 0),
    ],
    ids=["name", "arguments", "both", "object", "class", "betas"],
)
async def test_a_noise_scheduler_is_given_in_many_ways(
    pipe: Any, scheduler: Any, class_name: str, steps_offset: int
) -> None:
    await pipe.set_scheduler(scheduler)
    assert type(pipe.scheduler).__name__ == class_name
    assert pipe.scheduler.config.steps_offset == steps_offset
    await pipe.set_scheduler(None)
    assert pipe.scheduler.config["steps_offset"] == 1


async def test_from_config_of_diffusers_takes_the_remote_configuration(pipe: Any, daemon: FakeDaemon) -> None:
    local = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert local.config.beta_start == 0.00085
    await pipe.set_scheduler(local)
    sent = daemon.last(pipeline_service_pb2.UpdatePipelineRequest)
    assert list(sent.update_mask.paths) == ["noise_scheduler"]
    config = {name: values.from_proto(value) for name, value in sent.settings.noise_scheduler.config.entries.items()}
    assert config == dict(local.config)


async def test_one_pipeline_can_have_what_another_has(pipe: Any, client: Any) -> None:
    await pipe.set_scheduler(("PNDMScheduler", {"steps_offset": 6}))
    other = await client.load("demo")
    await other.set_scheduler(pipe.scheduler)
    assert other.scheduler == pipe.scheduler


async def test_a_call_may_bring_its_own(pipe: Any, daemon: FakeDaemon) -> None:
    await pipe("an apple", noise_scheduler=("DDIMScheduler", {"steps_offset": 2}))
    sent = daemon.last(pb.GenerateRequest).noise_scheduler
    assert (sent.class_name, sent.overrides["steps_offset"].int_value) == ("DDIMScheduler", 2)
    await pipe("an apple")
    assert not daemon.last(pb.GenerateRequest).HasField("noise_scheduler")


@pytest.mark.parametrize("wrong", [object(), 3, ["EulerDiscreteScheduler"], torch.nn.Linear(1, 1)])
async def test_what_is_no_noise_scheduler_is_refused_here(pipe: Any, wrong: Any) -> None:
    with pytest.raises(errors.InvalidFieldError, match="is no noise scheduler"):
        await pipe.set_scheduler(wrong)


async def test_the_daemon_refuses_classes_that_it_does_not_have(pipe: Any) -> None:
    with pytest.raises(errors.InvalidNoiseSchedulerError):
        await pipe.set_scheduler("UNet2DConditionModel")
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"


async def test_a_noise_scheduler_shows_itself(pipe: Any) -> None:
    assert repr(pipe.scheduler).startswith("DDIMScheduler {")
    with pytest.raises(AttributeError, match="'sigmas' is not there"):
        _ = pipe.scheduler.sigmas


# What is seen of a pipeline


async def test_a_pipelines_class_has_the_remote_name(sdk: Any, pipe: Any) -> None:
    inner: Any = getattr(pipe, "inner", pipe)
    assert type(inner).__name__ == inner.__class__.__name__ == "StableDiffusionPipeline"
    assert any(isinstance(inner, kind) for kind in (denoised.Pipeline, denoised.aio.AsyncPipeline))
    derived = await sdk.AutoPipelineForInpainting.from_pipe(pipe)
    assert type(getattr(derived, "inner", derived)).__name__ == "StableDiffusionInpaintPipeline"
    assert type(type(inner)(inner.client, inner.info, "")) is type(inner)


async def test_its_configuration_reads_as_in_diffusers(pipe: Any) -> None:
    config = pipe.config
    assert config._class_name == config["_class_name"] == "StableDiffusionPipeline"
    assert config.unet == ("diffusers", "UNet2DConditionModel")
    assert (config.tokens, config._name_or_path, pipe.name_or_path) == ([1, 2], "demo", "demo")
    with pytest.raises(AttributeError, match="it has _name_or_path"):
        _ = config.nothing
    for change in (lambda: config.update(a=1), lambda: setattr(config, "a", 1), lambda: config.pop("unet")):
        with pytest.raises(TypeError, match="cannot be changed"):
            change()


def test_a_configuration_can_be_copied() -> None:
    config = FrozenDict(a=1)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert isinstance(copy.copy(config), FrozenDict)


async def test_components_are_attributes(pipe: Any) -> None:
    inner = getattr(pipe, "inner", pipe)
    assert (inner.unet.class_name, inner.unet.config.sample_size, inner.unet.dtype) == (
        "UNet2DConditionModel", 8, "float32",
    )  # fmt: skip
    assert inner.unet.weight_bytes == 9000
    assert inner.safety_checker is None
    with pytest.raises(AttributeError, match=r"no 'unett'.*There is: .*unet"):
        _ = inner.unett
    assert not hasattr(inner, "transformer")


async def test_features_are_named_by_what_follows_enable(pipe: Any, daemon: FakeDaemon) -> None:
    await pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    request = daemon.last(pipeline_service_pb2.UpdatePipelineRequest)
    assert list(request.update_mask.paths) == ["features.freeu"]
    assert request.settings.features["freeu"].entries["b2"].double_value == 1.4
    await pipe.enable_vae_tiling()
    assert "vae_tiling" in daemon.last(pipeline_service_pb2.UpdatePipelineRequest).settings.features
    await pipe.disable_vae_tiling()
    request = daemon.last(pipeline_service_pb2.UpdatePipelineRequest)
    assert list(request.update_mask.paths) == ["features.vae_tiling"]
    assert not request.settings.features
    vae = getattr(pipe, "inner", pipe).vae
    assert not hasattr(getattr(pipe, "inner", pipe).unet, "enable_tiling")
    for method, path, is_set in (("enable_slicing", "vae_slicing", True), ("disable_tiling", "vae_tiling", False)):
        if inspect.isawaitable(done := getattr(vae, method)()):
            await done
        request = daemon.last(pipeline_service_pb2.UpdatePipelineRequest)
        assert (list(request.update_mask.paths), path in request.settings.features) == ([f"features.{path}"], is_set)


async def test_what_the_daemon_decides_is_taken_without_effect(pipe: Any, daemon: FakeDaemon) -> None:
    before = len(daemon.requests)
    inner = getattr(pipe, "inner", pipe)
    inner.enable_model_cpu_offload(gpu_id=0)
    inner.enable_sequential_cpu_offload()
    inner.enable_attention_slicing("max")
    inner.enable_xformers_memory_efficient_attention()
    inner.maybe_free_model_hooks()
    assert len(daemon.requests) == before


async def test_a_move_that_does_not_happen_is_told_once(pipe: Any) -> None:
    with pytest.warns(UserWarning, match="stays as it is"):
        pipe.to("cuda")
    pipe.to("cuda:1").to("cpu")


async def test_a_progress_bar_is_made_as_the_pipelines_own(pipe: Any) -> None:
    inner = getattr(pipe, "inner", pipe)
    inner.set_progress_bar_config(disable=True)
    assert list(inner.progress_bar(range(3))) == [0, 1, 2]
    with inner.progress_bar(total=2) as bar:
        bar.update()
    with pytest.raises(ValueError, match="total"):
        inner.progress_bar()


# Prompts and images


async def test_prompts_are_encoded_by_themselves(sdk: Any, pipe: Any, daemon: FakeDaemon) -> None:
    embeds, negative = await pipe.encode_prompt("an apple", "cuda", dtype=torch.float16, batching="forbid")
    assert torch.equal(embeds, torch.ones(1, 2, 3))
    assert negative is None
    request = daemon.last(pb.EncodePromptRequest)
    assert {name: values.from_proto(value) for name, value in request.arguments.items()} == {
        "prompt": "an apple",
        "dtype": "float16",
    }
    assert request.batching == pb.BATCHING_FORBID
    with pytest.raises(TypeError, match="positional"):
        await pipe.encode_prompt(1, 2, 3, 4, 5)
    derived = await sdk.AutoPipelineForInpainting.from_pipe(pipe)
    with pytest.raises(AttributeError, match="has no 'encode_prompt'"):
        await derived.encode_prompt("an apple")


@pytest.mark.parametrize("kind", [str, Path])
async def test_an_image_may_be_a_file_of_this_machine(
    pipe: Any, daemon: FakeDaemon, tmp_path: Path, kind: type[Any]
) -> None:
    Image.new("RGBA", (4, 2), (1, 2, 3, 255)).save(tmp_path / "a.png")
    await pipe("an apple", image=kind(tmp_path / "a.png"), mask_image=[kind(tmp_path / "a.png")])
    request = daemon.last(pb.GenerateRequest)
    picture = media.unpack(values.artifact_from_proto(request.image))
    assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (4, 2), (1, 2, 3))
    assert request.arguments["mask_image"].list_value.values[0].artifact_value.media_type == "image/png"
    (tmp_path / "b.png").write_text("no image")
    for missing in ("b.png", "c.png"):
        with pytest.raises(errors.InvalidFieldError, match=missing):
            await pipe("an apple", image=kind(tmp_path / missing))


def test_everything_that_a_pipeline_can_do_is_in_both() -> None:
    blocking, asyncio_ = ({name for name in dir(kind) if not name.startswith("_")} for kind in
                          (denoised.Pipeline, denoised.aio.AsyncPipeline))  # fmt: skip
    assert blocking == asyncio_
    assert builtins.isinstance(denoised.Pipeline.scheduler, property)

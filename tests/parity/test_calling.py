"""The same program against diffusers in this process, the blocking SDK and the asyncio SDK: what comes out is the same.

Calls forbid batching, so every bit is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import denoised
import denoised.aio
import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from PIL import Image

from tests.daemon import Daemon
from tests.unit.both_sdks import Awaited

torch.set_num_threads(1)
SIZE: dict[str, Any] = {"height": 64, "width": 64}
Program: TypeAlias = Callable[[Any, Any], Awaitable[Any]]
AUTO = {"text-to-image": "AutoPipelineForText2Image", "image-to-image": "AutoPipelineForImage2Image"}


class Side:
    """One of the three: makes pipelines, and has the few things that are spelled differently."""

    def __init__(self, name: str, sdk: Any, **settings: Any) -> None:
        self.name, self._sdk, self._settings = name, sdk, settings
        self.forbid: dict[str, Any] = {} if name == "local" else {"batching": "forbid"}

    async def load(self, folder: Path, task: str = "text-to-image") -> Any:
        kind = getattr(self._sdk, AUTO[task])
        pipe = kind.from_pretrained(folder, **self._settings)
        pipe = await pipe if self.name == "asyncio" else Awaited(pipe)
        self._inner(pipe).set_progress_bar_config(disable=True)
        return pipe

    def _inner(self, pipe: Any) -> Any:
        return getattr(pipe, "inner", pipe)

    async def run(self, pipe: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("generator", seeded(0))
        with torch.no_grad():
            return await pipe(*args, **kwargs, **self.forbid)

    async def set_scheduler(self, pipe: Any, scheduler: Any) -> None:
        if self.name == "asyncio":
            await pipe.set_scheduler(scheduler)
        else:
            await asyncio.to_thread(setattr, pipe.inner, "scheduler", scheduler)

    async def tile(self, pipe: Any, *, on: bool) -> None:
        vae = await asyncio.to_thread(getattr, self._inner(pipe), "vae")
        done = await asyncio.to_thread(vae.enable_tiling if on else vae.disable_tiling)
        if self.name == "asyncio":
            await done


@contextlib.asynccontextmanager
async def sides(daemon: Daemon) -> AsyncIterator[list[Side]]:
    async with denoised.aio.AsyncClient(daemon.target, progress_bar=False) as client:
        with daemon.client() as blocking:
            yield [
                Side("local", diffusers),
                Side("blocking", denoised, client=blocking),
                Side("asyncio", denoised.aio, client=client),
            ]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture() -> Image.Image:
    return Image.fromarray(np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype("uint8"))


def assert_same(one: Any, other: Any) -> None:
    """Equal in every bit and every type that a program can see."""
    match one:
        case torch.Tensor():
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
        case np.ndarray():
            np.testing.assert_array_equal(one, other)
        case Image.Image():
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
            assert one.mode == other.mode
        case dict():
            assert list(one) == list(other)
            for name in one:
                assert_same(one[name], other[name])
        case list() | tuple():
            assert len(one) == len(other)
            for pair in zip(one, other, strict=True):
                assert_same(*pair)
        case _:
            assert one == other
            assert type(one) is type(other)


# Programs: each returns all that it saw.


async def other_noise_schedulers(side: Side, folder: Path) -> Any:
    pipe = await side.load(folder)
    seen = []
    for kind, arguments in (
        (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
        (diffusers.EulerAncestralDiscreteScheduler, {}),
        (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
        (diffusers.HeunDiscreteScheduler, {}),
    ):
        await side.set_scheduler(pipe, kind.from_config(pipe.scheduler.config, **arguments))
        config = {name: value for name, value in sorted(pipe.scheduler.config.items()) if name != "_name_or_path"}
        used = sorted(config.pop("_use_default_values", []))
        images = (await side.run(pipe, "a cat", num_inference_steps=4, output_type="np", **SIZE)).images
        seen.append((type(pipe.scheduler).__name__, config, used, images))
    return seen


async def a_callback_that_looks_and_changes(side: Side, folder: Path) -> Any:
    pipe = await side.load(folder)
    seen: list[Any] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, timestep, {name: value.clone() for name, value in tensors.items()}))
        seen.append((type(pipe).__name__, pipe.guidance_scale, pipe.num_timesteps, pipe.do_classifier_free_guidance))
        tensors["latents"].mul_(0.95)
        return {"latents": tensors["latents"] + 0.01, "prompt_embeds": tensors["prompt_embeds"] * 1.01}

    made = await side.run(
        pipe,
        "a cat",
        num_inference_steps=4,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        output_type="np",
        **SIZE,
    )
    return seen, made.images


async def callbacks_of_diffusers(side: Side, folder: Path) -> Any:
    pipe = await side.load(folder)
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    images = []
    for callback in (cutoff, MultiPipelineCallbacks([cutoff])):
        made = await side.run(pipe, "a cat", num_inference_steps=4, callback_on_step_end=callback, **SIZE)
        images += made.images
    return images


async def an_interrupted_loop(side: Side, folder: Path) -> Any:
    pipe = await side.load(folder)

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return tensors

    stopped = await side.run(pipe, "a cat", num_inference_steps=20, callback_on_step_end=callback, **SIZE)
    whole = await side.run(pipe, "a cat", num_inference_steps=3, **SIZE)
    return stopped.images, whole.images


async def what_a_callback_raises(side: Side, folder: Path) -> Any:
    pipe = await side.load(folder)

    def callback(*_: Any) -> Any:
        raise ZeroDivisionError("enough")

    with pytest.raises(ZeroDivisionError, match="enough"):
        await side.run(pipe, "a cat", num_inference_steps=20, callback_on_step_end=callback, **SIZE)
    return (await side.run(pipe, "a cat", num_inference_steps=3, **SIZE)).images


async def generators_of_the_callers(side: Side, folder: Path) -> Any:
    pipe = await side.load(folder)
    one, many = seeded(1), [seeded(seed) for seed in range(4)]
    seen = []
    for _ in range(2):
        seen += (await side.run(pipe, "a cat", num_inference_steps=2, generator=one, **SIZE)).images
    prompts = {"prompt": ["a cat", "a dog"], "num_images_per_prompt": 2, "num_inference_steps": 2}
    seen += (await side.run(pipe, **prompts, generator=many, **SIZE)).images
    return seen, [torch.randn(3, generator=each) for each in (one, *many)]


async def embeddings_there_and_back(side: Side, folder: Path) -> Any:
    pipe = await side.load(folder)
    with torch.no_grad():
        embeds, negative = await pipe.encode_prompt("a cat", "cpu", 1, True, negative_prompt="a dog")
    made = await side.run(
        pipe,
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        latents=torch.randn(1, 4, 8, 8, generator=seeded(9)),
        num_inference_steps=3,
        output_type="pt",
    )
    return embeds, negative, made.images


async def every_form_of_output(side: Side, folder: Path) -> Any:
    pipe = await side.load(folder)
    seen: list[Any] = []
    for output_type in ("pil", "np", "pt", "latent"):
        asked = {"num_inference_steps": 2, "output_type": output_type, **SIZE}
        result = await side.run(pipe, "a cat", **asked)
        seen += [result.images, result.nsfw_content_detected, list(result.keys()), len(result)]
        seen.append(await side.run(pipe, "a cat", **asked, return_dict=False))
    return seen


async def every_form_of_image(side: Side, folder: Path) -> Any:
    pipe = await side.load(folder, "image-to-image")
    array = np.asarray(picture(), dtype="float32")[None] / 255
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    forms: list[Any] = [picture(), [picture(), picture()], array, tensor, [tensor[0]]]
    seen: list[Any] = []
    for form in forms:
        count = 2 if isinstance(form, list) and len(form) == 2 else 1
        prompt = ["a cat"] * count
        made = await side.run(pipe, prompt, image=form, strength=0.5, num_inference_steps=4, output_type="np")
        seen.append(made.images)
    return seen


async def tiles(side: Side, folder: Path) -> Any:
    pipe = await side.load(folder)
    seen = []
    for on in (False, True, False):
        await side.tile(pipe, on=on)
        seen.append((await side.run(pipe, "a cat", num_inference_steps=2, output_type="np", **SIZE)).images)
    assert not np.array_equal(seen[0], seen[1])
    return seen


async def what_is_seen(side: Side, folder: Path) -> Any:
    pipe = await side.load(folder)
    inner = getattr(pipe, "inner", pipe)
    config = dict(sorted(inner.config.items()))
    # The one thing that differs: the daemon's folders have other names.
    config.pop("_name_or_path")
    unet = sorted(inner.unet.config.items())
    return (
        type(inner).__name__,
        config,
        {name: tuple(value) if isinstance(value, list) else value for name, value in unet if not name.startswith("_")},
        inner.vae.config.scaling_factor,
        inner.safety_checker,
        sorted(name for name, part in inner.components.items() if part is not None),
        str(inner.device),
        inner.dtype,
    )  # fmt: skip


PROGRAMS: list[Program] = [
    other_noise_schedulers,
    a_callback_that_looks_and_changes,
    callbacks_of_diffusers,
    an_interrupted_loop,
    what_a_callback_raises,
    generators_of_the_callers,
    embeddings_there_and_back,
    every_form_of_output,
    every_form_of_image,
    tiles,
    what_is_seen,
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
async def test_a_program_sees_the_same(daemon: Daemon, sd_checkpoint: Path, program: Program) -> None:
    async with sides(daemon) as (local, *remote):
        expected = await program(local, sd_checkpoint)
        for side in remote:
            assert_same(expected, await program(side, sd_checkpoint))


BAD: dict[str, tuple[dict[str, Any], type[denoised.DenoisedError]]] = {
    "latents of a wrong shape": ({"latents": torch.zeros(1, 7, 8, 8)}, denoised.errors.PipelineRejectedError),
    "latents of integers": ({"latents": torch.zeros(1, 4, 8, 8, dtype=torch.int64)}, denoised.errors.InvalidFieldError),
    "latents that are not finite": (
        {"latents": torch.full((1, 4, 8, 8), torch.nan)},
        denoised.errors.InvalidFieldError,
    ),
    "embeddings of a wrong width": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 77, 5), "negative_prompt_embeds": torch.zeros(1, 77, 5)},
        denoised.errors.PipelineRejectedError,
    ),
    "ten thousand prompts": ({"prompt": ["a cat"] * 10_000}, denoised.errors.InvalidFieldError),
    "no noise scheduler": ({"noise_scheduler": "UNet2DConditionModel"}, denoised.errors.InvalidNoiseSchedulerError),
    "a noise scheduler with a wrong argument": (
        {"noise_scheduler": {"beta_strat": 1}},
        denoised.errors.InvalidNoiseSchedulerError,
    ),
    "tensors that there are not": (
        {"callback_on_step_end": lambda *_: None, "callback_on_step_end_tensor_inputs": ["hopes"]},
        denoised.errors.InvalidFieldError,
    ),
    "a callback that there is not": (
        {"prior_callback_on_step_end": lambda *_: None},
        denoised.errors.UnknownArgumentError,
    ),
    "a callback that returns a wrong shape": (
        {"callback_on_step_end": lambda *_: {"latents": torch.zeros(1, 9, 2, 2)}},
        denoised.errors.PipelineRejectedError,
    ),
    "a callback that returns nonsense": (
        {"callback_on_step_end": lambda *_: {"latents": object()}},
        denoised.errors.InvalidFieldError,
    ),
    "an image that is not there": ({"image": "/nowhere.png"}, denoised.errors.InvalidFieldError),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_refused_and_harms_nobody(daemon: Daemon, sd_checkpoint: Path, bad: str) -> None:
    arguments, kind = BAD[bad]
    good: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 3, "seed": 1, "batching": "forbid", **SIZE}
    with daemon.client() as client, client.load(str(sd_checkpoint), task="text-to-image") as pipe:
        before = pipe(**good).images
        with pytest.raises(kind) as refused:
            pipe(**good | arguments)
        assert refused.value.hint
        assert "/home" not in str(refused.value)
        assert_same(pipe(**good).images, before)

"""Callbacks in a real worker: asked at each step, answered by Replies, as diffusers asks them in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from denoised import media
from denoised.errors import GenerationInterruptedError, InvalidFieldError, PipelineRejectedError, UnknownArgumentError
from denoised.values import Plain
from denoised_server.messages import Callback, Done, Failed, Generate, Reply, StepEnd
from diffusers import StableDiffusionPipeline

from tests.unit.worker_driver import Driver, Running, images

ON_STEP_END = "callback_on_step_end"
Program = Callable[[StepEnd, dict[str, Any]], tuple[dict[str, Any], dict[str, Plain]]]
SIZE: dict[str, Any] = {"height": 64, "width": 64}


@pytest.fixture
def driver(checkpoint_dir: Path, sd_checkpoint: Path) -> Iterator[Driver]:
    driver = Driver(checkpoint_dir)
    driver.load("pipelines/a", sd_checkpoint)
    yield driver
    driver.close()


def begin(driver: Driver, callbacks: Mapping[str, Callback], *, conversation: str = "c", **arguments: Any) -> Running:
    packed = {name: media.pack(value) for name, value in arguments.items()} | SIZE
    command = Generate(
        "pipelines/a",
        packed,
        seeds=(0,),
        output_type="np",
        forbid_batching=True,
        callbacks=callbacks,
        conversation=conversation,
    )
    return driver.start(command)


def asked(running: Running) -> StepEnd:
    """The next question; fails when the generation ends without."""
    while not isinstance(event := running.next(), StepEnd):
        if isinstance(event, Failed):
            raise event.error
        assert not isinstance(event, Done)
    return event


def reply(driver: Driver, tensors: dict[str, Any], state: dict[str, Plain], conversation: str = "c") -> None:
    packed = {name: media.pack(value) for name, value in tensors.items()}
    assert driver.start(Reply(conversation, packed, state)).result() == []


def talk(driver: Driver, running: Running, program: Program) -> list[Any]:
    """Answers every question by the program, and returns the events."""
    events = []
    while not isinstance(event := running.next(), Done | Failed):
        events.append(event)
        if isinstance(event, StepEnd):
            reply(driver, *program(event, {name: media.unpack(value) for name, value in event.tensors.items()}))
    if isinstance(event, Failed):
        raise event.error
    return events


def in_process(local: Any, callback: Any, tensors: list[str], steps: int = 5, **arguments: Any) -> Any:
    return local(
        "a cat",
        num_inference_steps=steps,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=tensors,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **SIZE,
        **arguments,
    ).images


def test_a_callback_sees_what_it_sees_in_one_process(driver: Driver, local: StableDiffusionPipeline) -> None:
    expected: list[tuple[int, Any, Any]] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        expected.append((step, timestep, tensors["latents"].clone()))
        return {}

    image = in_process(local, callback, ["latents"])
    seen: list[tuple[int, Any, Any]] = []

    def program(event: StepEnd, tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Plain]]:
        seen.append((event.step, media.unpack(event.timestep), tensors["latents"]))
        return {}, {}

    running = begin(driver, {ON_STEP_END: Callback(("latents",))}, prompt="a cat", num_inference_steps=5)
    np.testing.assert_array_equal(images(talk(driver, running, program)), image)
    assert [step for step, _, _ in seen] == [step for step, _, _ in expected]
    assert all(
        torch.equal(*times) for times in zip(*([t for _, t, _ in each] for each in (seen, expected)), strict=True)
    )
    assert all(torch.equal(*them) for them in zip(*([x for _, _, x in each] for each in (seen, expected)), strict=True))


def test_tensors_and_attributes_that_a_callback_sets_have_effect(
    driver: Driver, local: StableDiffusionPipeline
) -> None:
    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"][-1:]
        tensors["latents"] = tensors["latents"] * 0.9
        return tensors

    def program(event: StepEnd, tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Plain]]:
        changed = {"latents": tensors["latents"] * 0.9}
        assert event.state["num_timesteps"] == 5
        if event.step == 2:
            assert event.state["do_classifier_free_guidance"] is True
            return changed | {"prompt_embeds": tensors["prompt_embeds"][-1:]}, {"_guidance_scale": 0.0}
        return changed, {}

    names = ("latents", "prompt_embeds")
    running = begin(driver, {ON_STEP_END: Callback(names)}, prompt="a cat", num_inference_steps=5)
    expected = in_process(local, callback, [*names])
    np.testing.assert_array_equal(images(talk(driver, running, program)), expected)


def test_interrupting_returns_what_there_is(driver: Driver, local: StableDiffusionPipeline) -> None:
    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return tensors

    calls = driver.snapshot().calls
    running = begin(driver, {ON_STEP_END: Callback()}, prompt="a cat", num_inference_steps=50)
    made = images(talk(driver, running, lambda event, _: ({}, {"_interrupt": event.step == 1})))
    assert driver.snapshot().calls - calls < 10
    np.testing.assert_array_equal(made, in_process(local, callback, ["latents"], steps=50))


def test_others_go_on_while_a_callback_thinks(driver: Driver) -> None:
    running = begin(driver, {ON_STEP_END: Callback()}, prompt="a cat", num_inference_steps=2)
    asked(running)
    driver.generate("pipelines/a", prompt="another", num_inference_steps=3, **SIZE).result()
    reply(driver, {}, {})
    asked(running)
    reply(driver, {}, {})
    running.result()


def test_two_callbacks_at_once_are_answered_apart(driver: Driver, local: StableDiffusionPipeline) -> None:
    one, two = (
        begin(
            driver,
            {ON_STEP_END: Callback(("latents",))},
            conversation=name,
            prompt="a cat",
            num_inference_steps=2,
        )
        for name in ("one", "two")
    )
    for step in range(2):
        for running in (one, two):
            assert asked(running).step == step
        reply(driver, {}, {}, "two")
        reply(driver, {}, {}, "one")
    np.testing.assert_array_equal(*(images(running.result()) for running in (one, two)))


def test_cancelling_a_parked_request_ends_it_at_once(driver: Driver) -> None:
    running = begin(driver, {ON_STEP_END: Callback(("latents",))}, prompt="a cat", num_inference_steps=50)
    asked(running)
    running.cancel()
    assert running.result() == []
    assert driver.unload("pipelines/a") > 0


def test_a_reply_to_what_has_ended_is_nothing(driver: Driver) -> None:
    reply(driver, {"latents": torch.zeros(1)}, {}, "long ago")


def test_a_reply_that_comes_before_the_request_sleeps_is_not_lost(driver: Driver) -> None:
    """The event is out before the request is parked: replies as fast as can be."""
    for _ in range(3):
        running = begin(driver, {ON_STEP_END: Callback(("latents",))}, prompt="a cat", num_inference_steps=20)
        assert len([e for e in talk(driver, running, lambda *_: ({}, {})) if isinstance(e, StepEnd)]) == 20


def test_a_tensor_of_the_wrong_shape_is_refused_and_harms_nobody(driver: Driver) -> None:
    request: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 3, "forbid": True, **SIZE}
    before = images(driver.generate("pipelines/a", **request).result())
    running = begin(driver, {ON_STEP_END: Callback(("latents",))}, prompt="a cat", num_inference_steps=5)
    with pytest.raises(PipelineRejectedError):
        talk(driver, running, lambda *_: ({"latents": torch.zeros(1, 7, 3, 3)}, {}))
    np.testing.assert_array_equal(images(driver.generate("pipelines/a", **request).result()), before)


def test_tensors_that_the_family_does_not_have_are_named(driver: Driver) -> None:
    running = begin(driver, {ON_STEP_END: Callback(("latents", "hopes"))}, prompt="a cat")
    with pytest.raises(InvalidFieldError, match="no 'hopes'") as failed:
        running.result()
    assert "prompt_embeds" in failed.value.hint


def test_a_callback_that_the_family_does_not_take_is_named(driver: Driver) -> None:
    with pytest.raises(UnknownArgumentError, match="prior_callback_on_step_end"):
        begin(driver, {"prior_callback_on_step_end": Callback()}, prompt="a cat").result()


def test_the_older_callback_gets_the_latents(driver: Driver, local: StableDiffusionPipeline) -> None:
    expected: list[tuple[int, Any]] = []
    with pytest.warns(FutureWarning, match="callback"):
        local(
            "a cat",
            num_inference_steps=4,
            callback=lambda step, timestep, latents: expected.append((step, latents.clone())),
            callback_steps=2,
            generator=torch.Generator().manual_seed(0),
            **SIZE,
        )
    seen: list[tuple[int, Any]] = []

    def program(event: StepEnd, tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Plain]]:
        seen.append((event.step, tensors["latents"]))
        return {}, {}

    talk(
        driver,
        begin(driver, {"callback": Callback(("latents",), 2)}, prompt="a cat", num_inference_steps=4),
        program,
    )
    assert [step for step, _ in seen] == [step for step, _ in expected] == [0, 2]
    assert all(torch.equal(*pair) for pair in zip(*([x for _, x in each] for each in (seen, expected)), strict=True))


def interrupt(event: StepEnd, tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Plain]]:
    return {}, {"_interrupt": True}


class PlainPipeline(StableDiffusionPipeline):  # type: ignore[misc]
    """A family without callbacks and without `_interrupt`: most of what diffusers had until 2023."""

    def __call__(self, prompt: str, num_inference_steps: int = 5, generator: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("return_dict"), kwargs.pop("callback_on_step_end", None)
        return super().__call__(prompt, num_inference_steps=num_inference_steps, generator=generator, **kwargs)


@pytest.fixture
def plain(driver: Driver) -> Driver:
    worker = driver.worker
    live = worker._pipelines["pipelines/a"]
    live.pipeline = PlainPipeline(**live.pipeline.components, requires_safety_checker=False)
    return driver


def test_a_family_without_callbacks_is_asked_at_its_noise_schedulers_steps(
    plain: Driver, local: StableDiffusionPipeline
) -> None:
    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] + 0.01 * step}

    seen = []

    def program(event: StepEnd, tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Plain]]:
        seen.append(event.step)
        return {"latents": tensors["latents"] + 0.01 * event.step}, {}

    running = begin(plain, {ON_STEP_END: Callback(("latents",))}, prompt="a cat", num_inference_steps=5)
    np.testing.assert_array_equal(images(talk(plain, running, program)), in_process(local, callback, ["latents"]))
    assert seen == [0, 1, 2, 3, 4]


def test_a_family_that_cannot_be_interrupted_ends_with_an_error(plain: Driver) -> None:
    running = begin(plain, {ON_STEP_END: Callback(("latents",))}, prompt="a cat", num_inference_steps=50)
    with pytest.raises(GenerationInterruptedError):
        talk(plain, running, interrupt)


def test_a_family_without_callbacks_has_latents_only(plain: Driver) -> None:
    with pytest.raises(InvalidFieldError, match="no 'prompt_embeds'"):
        begin(plain, {ON_STEP_END: Callback(("prompt_embeds",))}, prompt="a cat").result()


def test_arrays_come_back_as_the_tensors_that_they_replace(driver: Driver, local: StableDiffusionPipeline) -> None:
    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 2}

    def program(event: StepEnd, tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Plain]]:
        return {"latents": tensors["latents"].numpy().astype("float64") * 2}, {}

    running = begin(driver, {ON_STEP_END: Callback(("latents",))}, prompt="a cat", num_inference_steps=5)
    np.testing.assert_array_equal(images(talk(driver, running, program)), in_process(local, callback, ["latents"]))

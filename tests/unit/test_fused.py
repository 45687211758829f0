"""Requests that are equal but for prompt and seed run as one, where that comes to the same, and nobody can tell.

The reference is the same request with batching forbidden, which the parity suite shows equal to diffusers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from denoised.errors import InternalError, PipelineRejectedError
from denoised_server.messages import Done, Failed, Finished, Generate, NoiseScheduler, Progress
from denoised_server.worker.batches import Batches
from denoised_server.worker.fusing import Fusing
from PIL import Image

from tests.unit.worker_driver import Driver, Running, finished, images

NAME = "pipelines/a"
PROMPTS = ("a cat", "a dog beside a house", "two birds", "an old tree on a hill")
STEPS = 5


@pytest.fixture
def driver(checkpoint_dir: Path, sd_checkpoint: Path) -> Iterator[Driver]:
    driver = Driver(checkpoint_dir)
    driver.load(NAME, sd_checkpoint)
    yield driver
    driver.close()


def request(index: int, **more: Any) -> dict[str, Any]:
    given = {"prompt": PROMPTS[index % len(PROMPTS)], "seed": index, "num_inference_steps": STEPS}
    return given | {"height": 64, "width": 64} | more


def at_once(driver: Driver, requests: list[dict[str, Any]], name: str = NAME) -> list[Running]:
    """Requests that the engine finds all together."""
    with driver.worker._construction.turn():
        running = [driver.generate(name, **each) for each in requests]
        # Pictures are decoded on other threads.
        while len(driver.worker._engine._inbox) < len(requests):
            time.sleep(0.001)
    return running


def prove(driver: Driver, make: Callable[[int], dict[str, Any]] = request, name: str = NAME) -> None:
    for running in at_once(driver, [make(0), make(1)], name):
        running.result()
    while driver.worker._engine._running:
        time.sleep(0.001)


def fused(driver: Driver) -> int:
    return driver.worker._engine.batches.counts["fused_requests"]


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


def alone(driver: Driver, count: int, make: Callable[[int], dict[str, Any]] = request, name: str = NAME) -> list[Any]:
    return [images(driver.generate(name, forbid=True, **make(index)).result()) for index in range(count)]


def test_each_gets_what_it_gets_alone(driver: Driver) -> None:
    expected = alone(driver, 4)
    prove(driver)
    assert fused(driver) == 0, "what is being proven is not believed"
    results = [running.result() for running in at_once(driver, [request(index) for index in range(4)])]
    assert fused(driver) == 4
    for events, reference in zip(results, expected, strict=True):
        close(images(events), reference)
        steps = [event.completed_steps for event in events if isinstance(event, Progress)]
        assert steps[0] == 1
        assert steps[-1] == STEPS
        assert steps == sorted(set(steps))
        costs = finished(events)
        assert costs.joined_calls == costs.calls
        assert costs.max_joined == 4


@pytest.mark.parametrize("task", ["image-to-image", "inpainting"])
def test_pictures_of_one_size_may_differ_too(driver: Driver, task: str) -> None:
    driver.derive("pipelines/b", NAME, task)
    ramp = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype("uint8")
    mask = Image.new("L", (64, 64), 255)

    def make(index: int) -> dict[str, Any]:
        picture = Image.fromarray(np.roll(ramp, 16 * index, axis=0))
        given = {"prompt": PROMPTS[index], "seed": index, "num_inference_steps": STEPS, "image": picture}
        return given | {"strength": 0.8} | ({"mask_image": mask} if task == "inpainting" else {})

    expected = alone(driver, 4, make, "pipelines/b")
    prove(driver, make, "pipelines/b")
    running = at_once(driver, [make(index) for index in range(4)], "pipelines/b")
    for each, reference in zip(running, expected, strict=True):
        close(images(each.result()), reference)
    assert fused(driver) == 4


def test_handles_of_one_checkpoint_fuse_and_what_differs_does_not(driver: Driver) -> None:
    prove(driver)
    driver.derive("pipelines/b", NAME, "text-to-image")
    with driver.worker._construction.turn():
        running = [driver.generate(name, **request(0)) for name in (NAME, "pipelines/b")]
        running += [
            driver.generate(NAME, **request(1, guidance_scale=3.0)),
            driver.generate(NAME, forbid=True, **request(2)),
        ]
    for each in running:
        each.result()
    assert fused(driver) == 2


def test_equal_noise_schedulers_that_requests_bring_are_made_once_and_fuse(driver: Driver) -> None:
    def at_once_with(wanted: NoiseScheduler) -> list[Any]:
        with driver.worker._construction.turn():
            # The first time it takes the engine's turn to make it.
            if driver.worker._variants.find(driver.worker._pipelines[NAME].pipeline, wanted) is None:
                return []
            arguments = {name: value for name, value in request(0).items() if name != "seed"}
            running = [
                driver.start(Generate(NAME, arguments, seeds=(seed,), output_type="np", noise_scheduler=wanted))
                for seed in range(2)
            ]
        return [images(each.result()) for each in running]

    euler = NoiseScheduler("EulerDiscreteScheduler")
    assert at_once_with(euler) == []
    arguments = {name: value for name, value in request(0).items() if name != "seed"}
    first = Generate(NAME, arguments, seeds=(1,), output_type="np", noise_scheduler=euler, forbid_batching=True)
    expected = images(driver.start(first).result())
    at_once_with(euler)
    while driver.worker._engine._running:
        time.sleep(0.001)
    close(at_once_with(euler)[1], expected)
    assert fused(driver) == 2


def test_one_that_is_cancelled_stops_no_other(driver: Driver) -> None:
    expected = alone(driver, 3)
    prove(driver)
    running = at_once(driver, [request(index) for index in range(3)])
    running[1].next()
    running[1].cancel()
    events = []
    while not isinstance(event := running[1].next(), Done | Failed):
        events.append(event)
    assert not any(isinstance(event, Finished) for event in events)
    close(images(running[0].result()), expected[0])
    close(images(running[2].result()), expected[2])


def test_all_that_are_cancelled_stop_and_leave_nothing(driver: Driver) -> None:
    def long(index: int) -> dict[str, Any]:
        return request(index, num_inference_steps=40)

    before = alone(driver, 1)
    prove(driver, long)
    running = at_once(driver, [long(index) for index in range(3)])
    running[0].next()
    for each in running:
        each.cancel()
    assert not any(isinstance(event, Finished) for each in running for event in each.result())
    assert fused(driver) == 0
    np.testing.assert_array_equal(alone(driver, 1), before)


def test_generators_come_back_advanced(driver: Driver) -> None:
    prove(driver)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    arguments = {name: value for name, value in request(0).items() if name != "seed"}
    with driver.worker._construction.turn():
        running = [
            driver.start(
                Generate(NAME, arguments, generators=(("cpu", each.get_state().numpy().tobytes()),), output_type="np")
            )
            for each in generators
        ]
    advanced = [finished(each.result()).generators[0][1] for each in running]
    assert fused(driver) == 2
    for generator, state in zip(generators, advanced, strict=True):
        torch.randn(1, 4, 8, 8, generator=generator)
        assert generator.get_state().numpy().tobytes() == state


def as_class(driver: Driver, call: Callable[..., Any]) -> None:
    """The pipeline's class from now on has this `__call__`, which gets the original one first."""
    pipeline = driver.worker._pipelines[NAME].pipeline
    plain = type(pipeline)

    class Other(plain):  # type: ignore[misc,valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return call(super().__call__, *args, **kwargs)

    pipeline.__class__ = Other


def test_a_pipeline_that_gives_all_the_first_ones_prompt_is_found_out(driver: Driver) -> None:
    expected = alone(driver, 3)

    def wrong(original: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs["prompt"], list):
            kwargs["prompt"] = [kwargs["prompt"][0]] * len(kwargs["prompt"])
        return original(*args, **kwargs)

    as_class(driver, wrong)
    for _ in range(2):
        for each, reference in zip(at_once(driver, [request(index) for index in range(3)]), expected, strict=True):
            close(images(each.result()), reference)
    assert fused(driver) == 0


def test_where_lists_fail_only_what_fails_alone_fails(driver: Driver) -> None:
    expected, fails = alone(driver, 3), False

    def failing(original: Any, *args: Any, **kwargs: Any) -> Any:
        if fails and isinstance(kwargs["prompt"], list):
            raise torch.OutOfMemoryError("injected")
        if kwargs["prompt"] == "":
            raise ValueError("no prompt")
        return original(*args, **kwargs)

    as_class(driver, failing)
    prove(driver)
    fails = True
    running = at_once(driver, [request(0), request(1), request(2), request(3, prompt="")])
    for each, reference in zip(running, expected, strict=False):
        close(images(each.result()), reference)
    with pytest.raises(PipelineRejectedError):
        running[3].result()
    assert fused(driver) == 0


def test_a_proof_does_not_outlive_its_pipeline(driver: Driver) -> None:
    for running in at_once(driver, [request(0), request(1)]):
        running.result()
    assert driver.unload(NAME) > 0
    assert not driver.worker._engine._shadows
    assert not driver.worker._engine._running


def test_whoever_waits_for_others_may_leave_and_runs_when_the_device_is_free(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = images(driver.generate(NAME, forbid=True, **request(1)).result())
    monkeypatch.setattr(Fusing, "gathers", lambda *_, **__: True)
    busy = driver.generate(NAME, **request(0, num_inference_steps=500))
    while not driver.worker._engine._running:
        time.sleep(0.001)
    waiting, leaving = (driver.generate(NAME, **request(index)) for index in (1, 2))
    leaving.cancel()
    assert leaving.result() == []
    assert driver.worker._engine._gathering
    busy.cancel()
    close(images(waiting.result()), expected)


def test_what_goes_wrong_beside_a_batch_is_its_own(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(Batches, "run", broken)
        with pytest.raises(InternalError):
            driver.generate(NAME, **request(0)).result()
    driver.generate(NAME, **request(0)).result()

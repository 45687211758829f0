"""What only the blocking or only the asyncio SDK can do."""

from __future__ import annotations

import asyncio
import signal
import threading
import warnings
from collections.abc import Iterator

import denoised
import denoised.aio
import pytest
from denoised.errors import InvalidFieldError

from tests.unit.fake_daemon import FakeDaemon


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    with FakeDaemon() as daemon:
        yield daemon


@pytest.fixture
def target(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DENOISED_TARGET", daemon.target)
    return daemon.target


def test_the_example_of_diffusers_runs_with_one_changed_import(target: str) -> None:
    import torch
    from denoised import AutoPipelineForImage2Image, AutoPipelineForText2Image

    with warnings.catch_warnings(action="ignore"):
        pipeline = AutoPipelineForText2Image.from_pretrained(
            "demo", torch_dtype=torch.float16, use_safetensors=True
        ).to("cuda")
    prompt = "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k"
    image = pipeline(prompt, num_inference_steps=25).images[0]
    pipe_i2i = AutoPipelineForImage2Image.from_pipe(pipeline)
    assert pipe_i2i(prompt, image=image, strength=0.5).images[0].size == image.size


def test_ctrl_c_stops_the_generation_in_the_daemon(target: str, daemon: FakeDaemon) -> None:
    daemon.step_seconds = 0.02
    pipe = denoised.AutoPipelineForText2Image.from_pretrained("demo")
    threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        pipe("an apple", num_inference_steps=1000)
    assert daemon.cancelled.wait(10)


def test_leaving_a_loop_over_events_is_enough_to_cancel(target: str, daemon: FakeDaemon) -> None:
    from denoised.v1.generation_service_pb2 import GenerateRequest

    daemon.step_seconds = 0.02
    with denoised.Client() as client:
        request = GenerateRequest(pipeline=client.load("demo").name)
        request.sampling.num_inference_steps = 1000
        for _ in client.generate(request):
            break
        assert daemon.cancelled.wait(10)


def test_components_and_memory_ask_the_daemon(target: str) -> None:
    pipe = denoised.AutoPipelineForText2Image.from_pretrained("demo")
    twin = denoised.AutoPipelineForInpainting.from_pipe(pipe)
    assert pipe.components["unet"].sharers == 2
    assert pipe.memory == denoised.Memory(exclusive_bytes=0, shared_bytes=10_000, device_bytes=6000, host_bytes=4000)
    twin.unload()
    assert (pipe.memory.exclusive_bytes, pipe.memory.shared_bytes) == (10_000, 0)


def test_a_remote_pipeline_cannot_be_changed_by_assignment(target: str) -> None:
    pipe = denoised.AutoPipelineForText2Image.from_pretrained("demo")
    with pytest.raises(AttributeError, match="'unet' of a remote pipeline cannot be set"):
        pipe.unet = object()
    with pytest.raises(InvalidFieldError, match="a object is no noise scheduler"):
        pipe.scheduler = object()


def test_a_noise_scheduler_is_assigned(target: str) -> None:
    pipe = denoised.AutoPipelineForText2Image.from_pretrained("demo")
    pipe.scheduler = "EulerDiscreteScheduler"
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    pipe.scheduler = ("DDIMScheduler", {"steps_offset": 2})
    assert pipe.scheduler.config.steps_offset == 2
    pipe.scheduler = None
    assert pipe.scheduler.config.steps_offset == 1


async def test_an_assignment_cannot_be_awaited(target: str) -> None:
    async with denoised.aio.AsyncClient(progress_bar=False) as client:
        pipe = await client.load("demo")
        with pytest.raises(AttributeError, match=r"set_scheduler"):
            pipe.scheduler = "EulerDiscreteScheduler"  # type: ignore[assignment, misc]


async def test_a_coroutine_may_be_a_callback_where_it_is_awaited(target: str) -> None:
    seen: list[int] = []

    async def callback(pipe: object, step: int, timestep: object, tensors: object) -> None:
        await asyncio.sleep(0)
        seen.append(step)

    async with denoised.aio.AsyncClient(progress_bar=False) as client:
        pipe = await client.load("demo")
        await pipe("an apple", num_inference_steps=3, callback_on_step_end=callback)
    assert seen == [0, 1, 2]
    blocking = denoised.AutoPipelineForText2Image.from_pretrained("demo")
    with pytest.raises(denoised.errors.UnsupportedError, match="would have to be awaited"):
        await asyncio.to_thread(blocking, "an apple", callback_on_step_end=callback)


def test_another_thread_may_stop_a_generation(target: str, daemon: FakeDaemon) -> None:
    daemon.step_seconds = 0.02
    pipe = denoised.AutoPipelineForText2Image.from_pretrained("demo")
    threading.Timer(0.2, setattr, [pipe, "_interrupt", True]).start()
    with pytest.raises(denoised.errors.GenerationInterruptedError):
        pipe("an apple", num_inference_steps=1000)
    assert daemon.cancelled.wait(10)
    daemon.step_seconds = 0.0
    assert pipe("an apple").images


def test_a_notebook_shows_its_components(target: str) -> None:
    shown = denoised.AutoPipelineForText2Image.from_pretrained("demo")._repr_html_()
    assert "<td>UNet2DConditionModel</td><td>8.79 KiB</td><td>float32</td><td>1</td>" in shown


def test_pipelines_of_one_target_share_a_client(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = denoised.default_client()
    assert denoised.default_client() is one
    monkeypatch.setenv("DENOISED_TARGET", "elsewhere:1")
    assert denoised.default_client() is not one
    monkeypatch.setenv("DENOISED_TARGET", target)
    one.close()
    assert denoised.default_client() is not one


def test_each_event_loop_has_a_client_of_its_own(target: str) -> None:
    async def program() -> denoised.aio.AsyncClient:
        pipe = await denoised.aio.AutoPipelineForText2Image.from_pretrained("demo")
        assert denoised.aio.default_client() is pipe.client
        await pipe("an apple")
        await pipe.client.close()
        return pipe.client

    assert asyncio.run(program()) is not asyncio.run(program())


async def test_cancelling_a_task_stops_the_generation(target: str, daemon: FakeDaemon) -> None:
    daemon.step_seconds = 0.02
    async with denoised.aio.AsyncClient(progress_bar=False) as client:
        pipe = await client.load("demo")
        running = asyncio.create_task(pipe("an apple", num_inference_steps=1000))
        await asyncio.sleep(0.1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await asyncio.to_thread(daemon.cancelled.wait, 10)


async def test_generations_of_one_loop_run_at_the_same_time(target: str, daemon: FakeDaemon) -> None:
    async with denoised.aio.AsyncClient(progress_bar=False) as client, asyncio.TaskGroup() as group:
        pipe = await client.load("demo")
        tasks = [group.create_task(pipe("an apple", seed=seed)) for seed in range(8)]
        assert [(await task).seeds for task in tasks] == [(seed,) for seed in range(8)]

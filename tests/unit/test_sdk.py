"""What both SDKs promise: one program, run on the blocking and on the asyncio client."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import types
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from denoised import errors, values
from denoised.v1 import generation_service_pb2, pipeline_service_pb2, worker_service_pb2
from PIL import Image

from tests.unit.both_sdks import AsyncSdk, BlockingSdk
from tests.unit.fake_daemon import DEFAULT_SEED, FakeDaemon, colour


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


def sent(daemon: FakeDaemon) -> generation_service_pb2.GenerateRequest:
    request: generation_service_pb2.GenerateRequest = daemon.last(generation_service_pb2.GenerateRequest)
    return request


# Loading and deriving


async def test_from_pretrained_loads_for_its_task(sdk: Any, client: Any, daemon: FakeDaemon) -> None:
    pipe = await sdk.AutoPipelineForInpainting.from_pretrained(
        "demo",
        client=client,
        torch_dtype=torch.float16,
        variant="fp16",
        use_safetensors=True,
        ttl="1h",
        keep_alive="5m",
        pinned=True,
        pipeline_id="x",
    )
    request = daemon.last(pipeline_service_pb2.LoadPipelineRequest)
    assert pipe.name == "pipelines/x"
    assert pipe.task == "inpainting"
    assert pipe.dtype == torch.float16
    assert pipe.device == torch.device("cpu")
    assert (request.spec.variant, request.spec.use_safetensors, request.ttl.seconds) == ("fp16", True, 3600)
    assert (request.keep_alive.seconds, request.pinned) == (300, True)


async def test_a_component_set_to_none_is_sent_as_null(sdk: Any, client: Any, daemon: FakeDaemon) -> None:
    pipe = await sdk.AutoPipelineForText2Image.from_pretrained("demo", client=client, vae=None, requires_safety=False)
    overrides = daemon.last(pipeline_service_pb2.LoadPipelineRequest).spec.overrides
    assert overrides["vae"].value.WhichOneof("kind") == "null_value"
    assert overrides["requires_safety"].value.bool_value is False
    assert "vae" not in pipe.components


async def test_from_pipe_shares_every_component(sdk: Any, pipe: Any) -> None:
    derived = await sdk.AutoPipelineForImage2Image.from_pipe(pipe)
    await pipe.refresh()
    assert derived.task == "image-to-image"
    assert {role: part.digest for role, part in derived.components.items()} == {
        role: part.digest for role, part in pipe.components.items()
    }
    assert pipe.components["unet"].sharers == 2
    assert (pipe.memory.exclusive_bytes, pipe.memory.shared_bytes) == (0, 10_000)


async def test_from_pipe_tells_none_from_absent(sdk: Any, pipe: Any, daemon: FakeDaemon) -> None:
    await sdk.AutoPipelineForImage2Image.from_pipe(pipe)
    assert "controlnet" not in daemon.last(pipeline_service_pb2.DerivePipelineRequest).derivation.overrides
    await sdk.AutoPipelineForImage2Image.from_pipe(pipe, controlnet=None)
    overrides = daemon.last(pipeline_service_pb2.DerivePipelineRequest).derivation.overrides
    assert overrides["controlnet"].value.HasField("null_value")


async def test_from_pipe_takes_only_pipelines_of_a_daemon(sdk: Any) -> None:
    with pytest.raises(errors.UnsupportedError, match="does not live in a daemon"):
        await sdk.AutoPipelineForImage2Image.from_pipe(object())


async def test_a_load_reports_its_progress(client: Any) -> None:
    seen: list[int] = []
    await client.load("demo", on_progress=lambda progress: seen.append(progress.completed_bytes))
    assert seen == [0, 5000, 10000]


async def test_a_plan_says_what_a_load_would_take(client: Any, daemon: FakeDaemon) -> None:
    plan = await client.plan("demo", dtype="float16", overrides={"vae": None}, local_files_only=True)
    assert (plan.outcome, plan.fits, plan.new_bytes, plan.shared_bytes) == ("evicts", True, 9000, 1000)
    assert [(part.role, part.dtype, part.held) for part in plan.components] == [
        ("text_encoder", "float16", True),
        ("unet", "float16", False),
    ]
    assert plan.components[1].file_bytes == {"F32": 18_000}
    assert plan.evictions[0].pipelines == ("pipelines/a",)
    assert (plan.download_bytes, plan.load_seconds) == (18_000, 2.0)
    request = daemon.last(pipeline_service_pb2.PlanPipelineRequest)
    assert request.local_files_only
    assert request.spec.overrides["vae"].value.HasField("null_value")
    assert daemon.names == []
    assert not (await client.plan("demo", dtype="float64")).fits
    with pytest.raises(errors.RepoNotFoundError):
        await client.plan("absent")


async def test_workers_can_be_watched(client: Any, daemon: FakeDaemon) -> None:
    seen = [response.worker.running_count async for response in client.watch_workers(0.5)]
    assert seen == [0, 1]
    assert daemon.last(worker_service_pb2.WatchWorkersRequest).interval.ToMilliseconds() == 500


async def test_leaving_the_block_unloads(pipe: Any, daemon: FakeDaemon) -> None:
    async with pipe:
        assert daemon.names == [pipe.name]
    assert daemon.names == []
    with pytest.raises(errors.PipelineNotFoundError, match="There is no"):
        await pipe("an apple")


async def test_an_error_inside_the_block_is_not_hidden_by_the_clean_up(pipe: Any, daemon: FakeDaemon) -> None:
    daemon.failure = errors.InternalError("cannot unload")
    with pytest.raises(ZeroDivisionError):
        async with pipe:
            _ = 1 / 0


async def test_unloading_says_what_it_freed_and_works_twice(pipe: Any) -> None:
    assert await pipe.unload() == 10_000
    assert await pipe.unload() == 0


async def test_a_lease_is_renewed(pipe: Any, daemon: FakeDaemon) -> None:
    before = pipe.info.expire_time.seconds
    await pipe.renew(7200)
    assert pipe.info.expire_time.seconds > before + 6000
    request = daemon.last(pipeline_service_pb2.RenewPipelineRequest)
    assert request.ttl.seconds == 7200
    assert {field.name for field, _ in request.ListFields()} == {"name", "ttl"}
    await pipe.renew(pinned=False, keep_alive=-1)
    request = daemon.last(pipeline_service_pb2.RenewPipelineRequest)
    assert (request.HasField("ttl"), request.HasField("pinned"), request.keep_alive.seconds) == (False, True, -1)


# Calling


async def test_a_call_returns_images_seeds_and_timings(pipe: Any) -> None:
    result = await pipe("an apple", num_inference_steps=3, height=16, width=24)
    assert [picture.size for picture in result.images] == [(24, 16)]
    assert result.images[0].getpixel((0, 0)) == colour(DEFAULT_SEED)
    assert result.seeds == (DEFAULT_SEED,)
    assert (result.timings.calls, result.timings.run_seconds, result.timings.max_joined) == (3, 1.5, 2)


async def test_each_seed_makes_its_own_image(pipe: Any) -> None:
    result = await pipe("an apple", num_images_per_prompt=2, seed=[5, 600])
    assert [picture.getpixel((0, 0)) for picture in result.images] == [colour(5), colour(600)]
    assert result.seeds == (5, 600)


async def test_raw_pixels_travel_on_this_machine_and_the_media_type_can_be_chosen(
    pipe: Any, daemon: FakeDaemon
) -> None:
    await pipe("an apple")
    assert sent(daemon).output.media_type == values.NDARRAY
    result = await pipe("an apple", media_type="image/webp", quality=80)
    assert (sent(daemon).output.media_type, sent(daemon).output.quality) == ("image/webp", 80)
    assert isinstance(result.images[0], Image.Image)


async def test_positional_arguments_follow_the_pipeline(pipe: Any, daemon: FakeDaemon) -> None:
    await pipe("an apple", Image.new("RGB", (8, 8)))
    assert sent(daemon).prompt == "an apple"
    assert sent(daemon).image.media_type == "image/png"
    with pytest.raises(TypeError, match="multiple values for argument 'prompt'"):
        await pipe("an apple", prompt="another")
    with pytest.raises(TypeError, match="positional arguments"):
        await pipe(*range(30))


async def test_none_arrives_as_null_and_absent_stays_absent(pipe: Any, daemon: FakeDaemon) -> None:
    await pipe("an apple", guidance_scale=None, latents=None)
    request = sent(daemon)
    assert request.arguments["guidance_scale"].HasField("null_value")
    assert request.arguments["latents"].HasField("null_value")
    assert not request.sampling.HasField("guidance_scale")
    assert not request.HasField("negative_prompt")


async def test_tensors_go_out_and_come_back(pipe: Any, daemon: FakeDaemon) -> None:
    result = await pipe("an apple", latents=torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16), output_type="pt")
    artifact = sent(daemon).arguments["latents"].artifact_value
    assert values.artifact_from_proto(artifact).shape == (1, 4, 2, 2)
    assert isinstance(result.images, torch.Tensor)
    assert result.images.shape == (1, 3, 8, 8)


async def test_arrays_come_back_whole(pipe: Any) -> None:
    result = await pipe("an apple", output_type="np", num_images_per_prompt=3)
    assert isinstance(result.images, np.ndarray)
    assert result.images.shape == (3, 8, 8, 3)
    result.images[0] = 0


async def test_return_dict_false_gives_a_tuple_with_the_empty_fields(pipe: Any, daemon: FakeDaemon) -> None:
    daemon.fields = {"nsfw_content_detected": None}
    images, flags = await pipe("an apple", return_dict=False)
    assert isinstance(images[0], Image.Image)
    assert flags is None


async def test_a_generator_is_left_as_diffusers_would_leave_it(pipe: Any, daemon: FakeDaemon) -> None:
    generators = [torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)]
    result = await pipe("an apple", generator=generators, num_images_per_prompt=2)
    expected = [torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)]
    for generator in expected:
        torch.rand(1, generator=generator)
    assert [torch.rand(1, generator=one) for one in generators] == [torch.rand(1, generator=one) for one in expected]
    assert result.seeds == ()
    assert [state.device for state in sent(daemon).sampling.generators] == ["cpu", "cpu"]


async def test_batching_and_priority_are_sent(pipe: Any, daemon: FakeDaemon) -> None:
    await pipe("an apple", batching="forbid", priority=9)
    assert sent(daemon).batching == generation_service_pb2.BATCHING_FORBID
    assert sent(daemon).priority == 9
    with pytest.raises(errors.InvalidFieldError, match="batching"):
        await pipe("an apple", batching="sometimes")


async def test_a_callback_is_told_of_each_step(pipe: Any) -> None:
    steps: list[tuple[int, dict[str, Any]]] = []
    await pipe(
        "an apple",
        num_inference_steps=3,
        callback_on_step_end=lambda pipe, step, timestep, tensors: steps.append((step, tensors)),
        callback_on_step_end_tensor_inputs=[],
    )
    assert steps == [(0, {}), (1, {}), (2, {})]


async def test_what_a_callback_raises_stops_the_generation(pipe: Any, daemon: FakeDaemon) -> None:
    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        raise ZeroDivisionError

    daemon.step_seconds = 0.02
    with pytest.raises(ZeroDivisionError):
        await pipe("an apple", num_inference_steps=1000, callback_on_step_end=stop)
    assert await asyncio.to_thread(daemon.cancelled.wait, 10)


async def test_a_deadline_stops_the_generation(pipe: Any, daemon: FakeDaemon) -> None:
    daemon.step_seconds = 0.02
    with pytest.raises(errors.DeadlineExceededError):
        await pipe("an apple", num_inference_steps=1000, timeout=0.1)
    assert await asyncio.to_thread(daemon.cancelled.wait, 10)


async def test_previews_reach_the_function_that_was_given(pipe: Any, daemon: FakeDaemon) -> None:
    seen: list[Any] = []
    await pipe("an apple", num_inference_steps=6, preview=2, on_preview=seen.append, preview_size=64)
    assert [(preview.completed_steps, preview.total_steps, preview.image.size) for preview in seen] == [
        (2, 6, (8, 8)),
        (4, 6, (8, 8)),
        (6, 6, (8, 8)),
    ]
    assert (sent(daemon).preview.step_interval, sent(daemon).preview.size) == (2, 64)


async def test_previews_that_nobody_would_see_are_not_asked_for(pipe: Any, daemon: FakeDaemon) -> None:
    await pipe("an apple", preview=2)
    assert not sent(daemon).HasField("preview")
    with pytest.raises(errors.InvalidFieldError, match="preview"):
        await pipe("an apple", preview="often", on_preview=print)
    with pytest.raises(errors.InvalidFieldError, match="on_preview"):
        await pipe("an apple", on_preview=1)


async def test_a_notebook_shows_the_latest_preview_and_clears_it_away(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    handle = types.SimpleNamespace(update=shown.append)

    def display(image: Any, *, display_id: bool) -> Any:
        assert display_id
        shown.append(image)
        return handle

    ipython = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    page = types.SimpleNamespace(display=display, HTML=lambda text: ("html", text))
    monkeypatch.setitem(sys.modules, "IPython.display", page)
    await pipe("an apple", num_inference_steps=3, preview=1)
    assert [image.size for image in shown[:3]] == [(8, 8)] * 3
    assert shown[3:] == [("html", "")]


async def test_leaving_the_events_stops_the_generation(client: Any, pipe: Any, daemon: FakeDaemon) -> None:
    daemon.step_seconds = 0.02
    request = generation_service_pb2.GenerateRequest(pipeline=pipe.name)
    request.sampling.num_inference_steps = 1000
    async with contextlib.aclosing(aiter(client.generate(request))) as events:
        async for event in events:
            assert event.progress.completed_steps == 1
            break
    assert await asyncio.to_thread(daemon.cancelled.wait, 10)


async def test_the_bar_of_a_call_shows_steps_and_the_queue(
    sdk: Any, daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.queue_positions = [2, 0]
    async with sdk.Client(daemon.target) as client:
        pipe = await sdk.AutoPipelineForText2Image.from_pretrained("demo", client=client)
        await pipe("an apple", num_inference_steps=3)
        shown = capsys.readouterr().err
        assert "Loading pipeline components" in shown
        assert "waiting, 2 before this one" in shown
        assert "3/3" in shown
        watched = daemon.last(generation_service_pb2.GenerateRequest).progress_interval
        pipe.set_progress_bar_config(disable=True)
        await pipe("an apple")
        assert capsys.readouterr().err == ""
        # Each message would take its time from the run.
        assert daemon.last(generation_service_pb2.GenerateRequest).progress_interval.nanos > watched.nanos > 0


# The object


async def test_to_returns_the_pipeline_and_warns_of_what_it_does_not_do(pipe: Any) -> None:
    assert pipe.to("cpu").to(torch.float32).name == pipe.name
    with pytest.warns(UserWarning, match="the daemon runs it on cpu"):
        pipe.to("cuda")
    with pytest.warns(UserWarning, match="name it in from_pretrained"):
        pipe.to(dtype=torch.float16)


async def test_an_unknown_attribute_names_what_there_is(pipe: Any) -> None:
    with pytest.raises(AttributeError, match=r"has no 'upscale'.*components"):
        _ = pipe.upscale


async def test_it_introduces_itself(pipe: Any, daemon: FakeDaemon) -> None:
    assert repr(pipe) == (
        f"<StableDiffusionPipeline pipelines/p0 at {daemon.target}: text-to-image, 3 components, "
        "9.77 KiB of weights (0 B shared)>"
    )


# The client


async def test_lists_go_through_all_pages(client: Any) -> None:
    for number in range(5):
        await client.load("demo", pipeline_id=f"x{number}")
    assert [pipe.name for pipe in await client.pipelines()] == [f"pipelines/x{number}" for number in range(5)]


async def test_a_pipeline_is_found_by_its_id_alone(client: Any, pipe: Any) -> None:
    assert (await client.pipeline("p0")).name == pipe.name
    with pytest.raises(LookupError):
        await client.pipeline("nobody")


async def test_workers_and_server_info_are_shown(client: Any) -> None:
    assert [worker.name for worker in await client.workers()] == ["workers/0"]
    assert (await client.server_info()).version == "9.9"


async def test_a_watch_starts_with_what_there_is(client: Any, pipe: Any, daemon: FakeDaemon) -> None:
    changes = []
    async with contextlib.aclosing(aiter(client.watch())) as events:
        async for event in events:
            changes.append((event.change, event.pipeline.name))
            if event.change == event.CHANGE_SYNCED:
                break
    assert changes[0] == (pipeline_service_pb2.WatchPipelinesResponse.CHANGE_ADDED, pipe.name)
    assert await asyncio.to_thread(daemon.cancelled.wait, 10)


async def test_questions_are_asked_again_when_the_line_is_bad(client: Any, pipe: Any, daemon: FakeDaemon) -> None:
    daemon.drops = 2
    assert len(await client.pipelines()) == 1
    assert daemon.drops == 0


async def test_a_load_is_not_sent_twice(client: Any, daemon: FakeDaemon) -> None:
    daemon.drops = 1
    with pytest.raises(errors.DaemonUnreachableError, match="the line is bad"):
        await client.load("demo")
    assert daemon.names == []


async def test_a_watch_outlives_the_clients_timeout(sdk: Any, daemon: FakeDaemon) -> None:
    async with sdk.Client(daemon.target, timeout=0.5) as client:
        threading.Timer(1, daemon.changed.set).start()
        assert [event.change async for event in client.watch()]


async def test_the_token_goes_with_every_call(sdk: Any, daemon: FakeDaemon) -> None:
    async with sdk.Client(daemon.target, token="secret") as client:
        await client.workers()
        assert daemon.metadata["authorization"] == "Bearer secret"
        await client.load("demo")
        assert daemon.metadata["authorization"] == "Bearer secret"


# Failures


async def test_an_error_arrives_as_the_class_that_was_raised(pipe: Any, daemon: FakeDaemon) -> None:
    daemon.failure = errors.QueueFullError("Too many.", hint="Come back.", retry_after=2.5, metadata={"waiting": "9"})
    with pytest.raises(errors.QueueFullError) as caught:
        await pipe("an apple")
    assert (caught.value.message, caught.value.hint) == ("Too many.", "Come back.")
    assert (caught.value.retry_after, caught.value.metadata) == (2.5, {"waiting": "9"})


async def test_an_unknown_argument_is_the_daemons_to_explain(pipe: Any) -> None:
    with pytest.raises(errors.UnknownArgumentError, match="etta") as caught:
        await pipe("an apple", etta=1)
    assert caught.value.metadata["suggestion"] == "eta"


async def test_a_load_that_fails_is_an_environment_error_as_in_diffusers(sdk: Any, client: Any) -> None:
    with pytest.raises(EnvironmentError, match=r"There is no 'nowhere'\. Try demo\."):
        await sdk.AutoPipelineForText2Image.from_pretrained("nowhere", client=client)


async def test_a_task_without_a_class_is_a_value_error_as_in_diffusers(sdk: Any, client: Any) -> None:
    pipe = await sdk.AutoPipelineForText2Image.from_pretrained("text-only", client=client)
    with pytest.raises(ValueError, match="no class for this task"):
        await sdk.AutoPipelineForInpainting.from_pipe(pipe)


async def test_nobody_at_the_target_is_said_with_the_target(sdk: Any) -> None:
    async with sdk.Client("127.0.0.1:1", timeout=20) as client:
        with pytest.raises(errors.DaemonUnreachableError, match=r"127\.0\.0\.1:1.*denoised serve"):
            await client.workers()


async def test_a_request_too_large_is_refused_before_it_is_sent(sdk: Any, daemon: FakeDaemon) -> None:
    async with sdk.Client(daemon.target, progress_bar=False, max_message_bytes=100_000) as client:
        pipe = await sdk.AutoPipelineForText2Image.from_pretrained("demo", client=client)
        before = len(daemon.requests)
        with pytest.raises(errors.MessageTooLargeError, match="at most 100,000"):
            await pipe("an apple", latents=np.zeros(100_000, np.uint8))
        assert len(daemon.requests) == before


async def test_a_response_too_large_is_named_as_such(sdk: Any, daemon: FakeDaemon) -> None:
    async with sdk.Client(daemon.target, progress_bar=False, max_message_bytes=100_000) as client:
        pipe = await sdk.AutoPipelineForText2Image.from_pretrained("demo", client=client)
        with pytest.raises(errors.MessageTooLargeError):
            await pipe("an apple", width=400, height=400)


async def test_a_closed_client_says_so(sdk: Any, daemon: FakeDaemon) -> None:
    client = sdk.Client(daemon.target)
    await client.workers()
    await client.close()
    with pytest.raises(errors.DenoisedError, match="closed"):
        await client.workers()


async def test_closing_the_client_ends_its_calls(sdk: Any, daemon: FakeDaemon) -> None:
    daemon.step_seconds = 0.02
    client = sdk.Client(daemon.target, progress_bar=False)
    pipe = await sdk.AutoPipelineForText2Image.from_pretrained("demo", client=client)
    running = asyncio.create_task(pipe("an apple", num_inference_steps=1000))
    await asyncio.sleep(0.1)
    await client.close()
    with pytest.raises(errors.DenoisedError):
        await running
    assert await asyncio.to_thread(daemon.cancelled.wait, 10)

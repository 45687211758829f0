"""The services over a real socket, with a fake executor behind them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from denoised.errors import (
    CallbackTimeoutError,
    DeadlineExceededError,
    DenoisedError,
    GenerationNotFoundError,
    InternalError,
    InvalidFieldError,
    MessageTooLargeError,
    NotAPipelineError,
    PipelineExistsError,
    PipelineNotFoundError,
    PipelineUnloadedError,
    QueueFullError,
    RequestKillsWorkerError,
    ShuttingDownError,
    UnknownArgumentError,
    WorkerLostError,
)
from denoised.status import from_call
from denoised.v1 import artifact_pb2, generation_service_pb2, pipeline_service_pb2, worker_service_pb2
from denoised.v1.generation_service_pb2_grpc import GenerationServiceStub
from denoised.v1.pipeline_service_pb2_grpc import PipelineServiceStub
from denoised.v1.worker_service_pb2_grpc import WorkerServiceStub
from denoised_server.access import Access
from denoised_server.interceptors import ErrorInterceptor
from denoised_server.messages import Generate, Load
from denoised_server.observer import Observer
from denoised_server.pool import Pool
from denoised_server.services import add_services
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from tests.unit.fake_executor import WEIGHT_BYTES, FakeExecutor

MAX_MESSAGE_BYTES = 200_000
Change = pipeline_service_pb2.WatchPipelinesResponse


class Outcomes(Observer):
    """Remembers how calls ended."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def request_ended(self, method: str, outcome: str, seconds: float) -> None:
        self.seen.append((method, outcome))


class Daemon:
    """Stubs of a daemon's services, and what is behind them."""

    def __init__(
        self, executor: FakeExecutor, pool: Pool, outcomes: Outcomes, channel: grpc.aio.Channel, port: int = 0
    ) -> None:
        self.port = port
        self.executor = executor
        self.pool = pool
        self.outcomes = outcomes.seen
        # Stubs on a channel of asyncio have types of their own, which do not exist at run time.
        self.pipelines: Any = PipelineServiceStub(channel)
        self.generations: Any = GenerationServiceStub(channel)
        self.workers: Any = WorkerServiceStub(channel)

    async def load(self, repo_id: str = "weights", **fields: Any) -> pipeline_service_pb2.Pipeline:
        spec = pipeline_service_pb2.PipelineSpec(repo_id=repo_id)
        request = pipeline_service_pb2.LoadPipelineRequest(spec=spec, **fields)
        responses = [response async for response in self.pipelines.LoadPipeline(request)]
        pipeline: pipeline_service_pb2.Pipeline = responses[-1].pipeline
        return pipeline

    def generate(self, pipeline: str, prompt: str = "a cat", **fields: Any) -> Any:
        request = generation_service_pb2.GenerateRequest(pipeline=pipeline, prompt=prompt, **fields)
        return self.generations.Generate(request)

    async def outcome(self, method: str) -> str:
        """How the last call of a method ended; the daemon may learn of it after its client."""
        await soon(lambda: any(name == method for name, _ in self.outcomes))
        return [outcome for name, outcome in self.outcomes if name == method][-1]


@asynccontextmanager
async def serving(access: Access | None = None, **settings: Any) -> AsyncIterator[Daemon]:
    executor, outcomes = FakeExecutor(), Outcomes()
    pool = Pool(executor, **settings)
    await pool.start()
    server = grpc.aio.server(
        interceptors=(
            ErrorInterceptor(access=access or Access(), max_message_bytes=MAX_MESSAGE_BYTES, observer=outcomes),
        ),
        options=(("grpc.max_receive_message_length", 2 * MAX_MESSAGE_BYTES),),
    )
    add_services(server, pool, max_message_bytes=MAX_MESSAGE_BYTES, max_pixels=1_000_000, max_waiting=5)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Daemon(executor, pool, outcomes, channel, port)
    await server.stop(None)
    await pool.stop()


@pytest.fixture
async def daemon() -> AsyncIterator[Daemon]:
    async with serving() as daemon:
        yield daemon


async def soon(predicate: Callable[[], object]) -> None:
    """Lets the daemon go on until something is true."""
    async with asyncio.timeout(5):
        while not predicate():  # noqa: ASYNC110 - what it waits for travels over a socket.
            await asyncio.sleep(0.001)


async def failure(call: Any) -> tuple[DenoisedError, grpc.StatusCode]:
    """The error of ours that a call fails with, and its status code."""

    async def finish() -> None:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await finish()
    error = caught.value
    trailing = tuple(error.trailing_metadata() or ())
    return from_call(error.code(), error.details(), trailing, target="test"), error.code()


async def fails_with(call: Any, kind: type[DenoisedError], code: str, **metadata: str) -> DenoisedError:
    error, found = await failure(call)
    assert type(error) is kind
    assert found is getattr(grpc.StatusCode, code)
    assert error.message
    assert error.hint or kind in (InternalError, WorkerLostError, DeadlineExceededError)
    assert metadata.items() <= error.metadata.items()
    return error


async def test_the_main_job(daemon: Daemon) -> None:
    loaded = await daemon.load(pipeline_id="mine", ttl={"seconds": 60})
    assert loaded.name == "pipelines/mine"
    assert loaded.state == pipeline_service_pb2.Pipeline.STATE_ACTIVE
    assert loaded.spec.dtype == artifact_pb2.DATA_TYPE_FLOAT32
    assert (loaded.exclusive_bytes, loaded.shared_bytes) == (WEIGHT_BYTES, 0)
    assert next(parameter.name for parameter in loaded.parameters) == "prompt"
    assert loaded.expire_time.seconds - loaded.last_use_time.seconds == 60
    derivation = pipeline_service_pb2.Derivation(task=pipeline_service_pb2.TASK_INPAINTING)
    request = pipeline_service_pb2.DerivePipelineRequest(source=loaded.name, derivation=derivation)
    derived = (await daemon.pipelines.DerivePipeline(request)).pipeline
    assert (derived.source, list(derived.derivations)) == (loaded.name, [derivation])
    assert (derived.exclusive_bytes, derived.shared_bytes) == (0, WEIGHT_BYTES)
    events = [event async for event in daemon.generate(derived.name, sampling={"seeds": [7], "num_inference_steps": 2})]
    assert [event.WhichOneof("event") for event in events] == ["started", "progress", "progress", "output", "summary"]
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5]
    assert (list(events[0].started.seeds), events[0].started.name[:12]) == ([7], "generations/")
    assert (events[3].output.artifact.data, events[3].output.seed) == (b"a cat", 7)
    assert (list(events[4].summary.seeds), events[4].summary.run_duration.nanos) == ([7], 250_000_000)
    for name, freed in ((loaded.name, 0), (derived.name, WEIGHT_BYTES), (derived.name, 0)):
        unload = pipeline_service_pb2.UnloadPipelineRequest(name=name)
        assert (await daemon.pipelines.UnloadPipeline(unload)).freed_bytes == freed
    assert {outcome for _, outcome in daemon.outcomes} == {"ok"}


async def test_pipelines_can_be_read_listed_and_renewed(daemon: Daemon) -> None:
    names = [(await daemon.load()).name for _ in range(3)]
    request = pipeline_service_pb2.GetPipelineRequest(name=names[0])
    assert (await daemon.pipelines.GetPipeline(request)).pipeline.shared_bytes == WEIGHT_BYTES
    page = await daemon.pipelines.ListPipelines(pipeline_service_pb2.ListPipelinesRequest(page_size=2))
    rest = await daemon.pipelines.ListPipelines(
        pipeline_service_pb2.ListPipelinesRequest(page_size=2, page_token=page.next_page_token)
    )
    assert [pipeline.name for pipeline in (*page.pipelines, *rest.pipelines)] == names
    assert rest.next_page_token == ""
    renew = pipeline_service_pb2.RenewPipelineRequest(name=names[0], ttl=Duration(seconds=5))
    renewed = (await daemon.pipelines.RenewPipeline(renew)).pipeline
    assert renewed.expire_time.seconds - renewed.last_use_time.seconds == 5


async def test_a_watch_shows_what_there_is_and_then_what_changes(daemon: Daemon) -> None:
    first = await daemon.load()
    watch = daemon.pipelines.WatchPipelines(pipeline_service_pb2.WatchPipelinesRequest())
    responses = [await watch.read() for _ in range(2)]
    assert [response.change for response in responses] == [Change.CHANGE_ADDED, Change.CHANGE_SYNCED]
    assert responses[0].pipeline == first
    await daemon.pipelines.UnloadPipeline(pipeline_service_pb2.UnloadPipelineRequest(name=first.name))
    while (response := await watch.read()).change != Change.CHANGE_REMOVED:
        pass
    assert response.pipeline.name == first.name
    watch.cancel()
    assert await daemon.outcome("WatchPipelines") == "cancelled"


async def test_workers_and_the_server_can_be_looked_at(daemon: Daemon) -> None:
    await daemon.load()
    async with asyncio.timeout(5):
        while True:
            (worker,) = (await daemon.workers.ListWorkers(worker_service_pb2.ListWorkersRequest())).workers
            if worker.memory.weight_bytes:
                break
    assert (worker.name, worker.state) == ("workers/0", worker_service_pb2.Worker.STATE_ACTIVE)
    assert (worker.pid, worker.pipeline_count, worker.memory.weight_bytes) == (1234, 1, WEIGHT_BYTES)
    info = await daemon.workers.GetServerInfo(worker_service_pb2.GetServerInfoRequest())
    assert info.max_message_bytes == MAX_MESSAGE_BYTES
    assert (info.library_versions["torch"], list(info.embedded_models)) == ("1.0", ["demo"])


async def test_a_plan_answers_and_loads_nothing(daemon: Daemon) -> None:
    spec = pipeline_service_pb2.PipelineSpec(repo_id="weights")
    plan = await daemon.pipelines.PlanPipeline(pipeline_service_pb2.PlanPipelineRequest(spec=spec))
    assert (plan.outcome, plan.worker) == (plan.OUTCOME_EVICTS, "workers/0")
    (unet,) = plan.components
    assert (unet.role, unet.weight_bytes, unet.held, unet.file_bytes["F32"]) == ("unet", WEIGHT_BYTES, False, 1000)
    assert (plan.new_bytes, plan.shared_bytes) == (WEIGHT_BYTES, 0)
    assert plan.expected_load_duration.ToMilliseconds() == 500
    listed = await daemon.pipelines.ListPipelines(pipeline_service_pb2.ListPipelinesRequest())
    assert list(listed.pipelines) == []
    await daemon.load()
    plan = await daemon.pipelines.PlanPipeline(pipeline_service_pb2.PlanPipelineRequest(spec=spec))
    assert (plan.outcome, plan.new_bytes, plan.shared_bytes) == (plan.OUTCOME_FITS, 0, WEIGHT_BYTES)
    _, refused = await failure(daemon.pipelines.PlanPipeline(pipeline_service_pb2.PlanPipelineRequest()))
    assert refused is grpc.StatusCode.INVALID_ARGUMENT


async def test_workers_can_be_watched(daemon: Daemon) -> None:
    interval = Duration(nanos=100_000_000)
    watch = daemon.workers.WatchWorkers(worker_service_pb2.WatchWorkersRequest(interval=interval))
    async with asyncio.timeout(5):
        assert (await watch.read()).worker.pipeline_count == 0
        await daemon.load()
        while (worker := (await watch.read()).worker).memory.weight_bytes != WEIGHT_BYTES:
            pass
    assert worker.pipeline_count == 1
    watch.cancel()
    assert await daemon.outcome("WatchWorkers") == "cancelled"
    short = worker_service_pb2.WatchWorkersRequest(interval=Duration(nanos=1))
    error, code = await failure(daemon.workers.WatchWorkers(short))
    assert (code, error.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "interval")


async def test_leaving_a_call_cancels_the_generation(daemon: Daemon) -> None:
    name = (await daemon.load()).name
    call = daemon.generate(name, "hang")
    await call.read()
    call.cancel()
    assert await daemon.outcome("Generate") == "cancelled"
    assert [type(command) for command in daemon.executor.cancelled] == [Generate]


async def test_leaving_a_load_abandons_it(daemon: Daemon) -> None:
    daemon.executor.hold(Load)
    spec = pipeline_service_pb2.PipelineSpec(repo_id="weights")
    call = daemon.pipelines.LoadPipeline(pipeline_service_pb2.LoadPipelineRequest(spec=spec))
    reading = asyncio.create_task(call.read())
    await soon(lambda: daemon.executor.sent(Load))
    call.cancel()
    await asyncio.wait([reading])
    assert await daemon.outcome("LoadPipeline") == "cancelled"
    await soon(lambda: daemon.pool.list_pipelines(page_size=0, page_token="") == ([], ""))
    assert [type(command) for command in daemon.executor.cancelled] == [Load]


async def test_a_deadline_that_passes_cancels_the_generation(daemon: Daemon) -> None:
    name = (await daemon.load()).name
    request = generation_service_pb2.GenerateRequest(pipeline=name, prompt="hang")
    await fails_with(daemon.generations.Generate(request, timeout=0.05), DeadlineExceededError, "DEADLINE_EXCEEDED")
    assert await daemon.outcome("Generate") == "deadline_exceeded"
    assert [type(command) for command in daemon.executor.cancelled] == [Generate]


SPECS = [
    ({}, "spec.repo_id"),
    ({"repo_id": "x" * 1025}, "spec.repo_id"),
    ({"repo_id": "a", "revision": "x" * 1025}, "spec.revision"),
    ({"repo_id": "a", "variant": "x" * 1025}, "spec.variant"),
    ({"repo_id": "a", "overrides": {"x" * 1025: {"value": {"bool_value": True}}}}, "spec.overrides"),
    ({"repo_id": "a", "overrides": {"x": {"value": {"string_value": "x" * 1025}}}}, "spec.overrides[x]"),
    (
        {"repo_id": "a", "overrides": {"vae": {"component": {"repo_id": "a", "subfolder": "x" * 1025}}}},
        "spec.overrides[vae].subfolder",
    ),
    ({"repo_id": "a", "task": 99}, "spec.task"),
    ({"repo_id": "a", "dtype": artifact_pb2.DATA_TYPE_INT8}, "spec.dtype"),
    ({"repo_id": "a", "dtype": 99}, "spec.dtype"),
    ({"repo_id": "a", "overrides": {"vae": pipeline_service_pb2.Override()}}, "spec.overrides[vae]"),
    ({"repo_id": "a", "overrides": {"vae": {"component": {}}}}, "spec.overrides[vae].repo_id"),
    ({"repo_id": "a", "overrides": {"vae": {"value": {}}}}, "spec.overrides[vae]"),
]


@pytest.mark.parametrize(("spec", "field"), SPECS)
async def test_a_bad_spec_is_refused_by_the_name_of_the_field(daemon: Daemon, spec: dict[str, Any], field: str) -> None:
    request = pipeline_service_pb2.LoadPipelineRequest(spec=pipeline_service_pb2.PipelineSpec(**spec))
    await fails_with(daemon.pipelines.LoadPipeline(request), InvalidFieldError, "INVALID_ARGUMENT", field=field)
    assert daemon.executor.sent(Load) == []


def nested(depth: int) -> dict[str, Any]:
    return {"list_value": {"values": [nested(depth - 1)]}} if depth else {"int_value": 1}


PNG = {"media_type": "image/png", "data": b"png"}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"sampling": {"num_inference_steps": -1}}, "num_inference_steps"),
        ({"sampling": {"height": 0}}, "height"),
        ({"sampling": {"height": 100_000, "width": 100_000}}, "height"),
        ({"arguments": {"num_inference_steps": {"int_value": 1001}}}, "num_inference_steps"),
        ({"arguments": {"prompt": {"string_value": "twice"}}}, "prompt"),
        ({"arguments": {"image": nested(9)}}, "image"),
        ({"arguments": {"image": {"string_value": "http://169.254.169.254/"}}}, "image"),
        ({"arguments": {"image": {"list_value": {"values": [{"string_value": "/etc/passwd"}]}}}}, "image"),
        ({"arguments": {"image": {"list_value": {"values": [{"int_value": 1}] * 10_001}}}}, "image"),
        ({"arguments": {"guidance_scale": {}}}, "guidance_scale"),
        ({"arguments": {"image": {"artifact_value": {"media_type": "image/png"}}}}, "image"),
        ({"arguments": {"image": {"list_value": {"values": [{"artifact_value": {"data": b"png"}}]}}}}, "image"),
        ({"image": {"media_type": "image/png"}}, "image"),
        ({"image": {"data": b"png"}}, "image"),
        ({"image": PNG, "arguments": {"image": {"artifact_value": PNG}}}, "image"),
        ({"arguments": {"generator": {"int_value": 1}}}, "generator"),
        ({"output": {"output_type": "gif"}}, "output.output_type"),
        ({"output": {"quality": 0}}, "output.quality"),
        ({"batching": 99}, "batching"),
        ({"priority": 101}, "priority"),
        ({"sampling": {"seeds": [1, 2]}}, "sampling.seeds"),
        ({"prompt": "x" * 65_537}, "prompt"),
    ],
)
async def test_a_bad_request_is_refused_by_the_name_of_the_field(
    daemon: Daemon, fields: dict[str, Any], field: str
) -> None:
    name = (await daemon.load()).name
    await fails_with(daemon.generate(name, **fields), InvalidFieldError, "INVALID_ARGUMENT", field=field)
    assert daemon.executor.sent(Generate) == []
    assert await daemon.outcome("Generate") == "invalid_field"


async def test_everything_that_a_request_says_reaches_the_worker(daemon: Daemon) -> None:
    name = (await daemon.load()).name
    call = daemon.generate(
        name,
        prompt="a cat",
        image=PNG,
        sampling={"height": 64, "guidance_scale": 7, "generators": [{"device": "cpu", "state": b"state"}]},
        arguments={"width": {"int_value": 32}},
        output={"output_type": "pt", "media_type": "image/jpeg", "quality": 50},
        batching=generation_service_pb2.BATCHING_FORBID,
        priority=-3,
    )
    events = [event async for event in call]
    (command,) = daemon.executor.sent(Generate)
    image: Any = command.arguments["image"]
    assert image.data == b"png"
    assert {key: command.arguments[key] for key in ("prompt", "height", "width", "guidance_scale")} == {
        "prompt": "a cat",
        "height": 64,
        "width": 32,
        "guidance_scale": 7.0,
    }
    assert (command.output_type, command.media_type, command.quality) == ("pt", "image/jpeg", 50)
    assert (command.forbid_batching, command.priority, command.seeds) == (True, -3, ())
    assert command.generators == (("cpu", b"state"),)
    assert events[-1].summary.generators[0].state == b"state"
    assert not any(event.output.HasField("seed") for event in events)


async def test_each_failure_has_its_code_and_its_reason(daemon: Daemon) -> None:
    name = (await daemon.load(pipeline_id="mine")).name
    unknown = daemon.generate(name, arguments={"promt": {"string_value": "x"}})
    await fails_with(unknown, UnknownArgumentError, "INVALID_ARGUMENT", suggestion="prompt")
    await fails_with(daemon.generate("mine"), InvalidFieldError, "INVALID_ARGUMENT", field="pipeline")
    await fails_with(daemon.generate("pipelines/absent"), PipelineNotFoundError, "NOT_FOUND")
    other = pipeline_service_pb2.PipelineSpec(repo_id="other")
    taken = pipeline_service_pb2.LoadPipelineRequest(spec=other, pipeline_id="mine")
    await fails_with(daemon.pipelines.LoadPipeline(taken), PipelineExistsError, "ALREADY_EXISTS")
    short = pipeline_service_pb2.LoadPipelineRequest(spec=other, ttl=Duration(nanos=1))
    await fails_with(daemon.pipelines.LoadPipeline(short), InvalidFieldError, "INVALID_ARGUMENT", field="ttl")
    absent = pipeline_service_pb2.LoadPipelineRequest(spec=pipeline_service_pb2.PipelineSpec(repo_id="absent"))
    error = await fails_with(daemon.pipelines.LoadPipeline(absent), NotAPipelineError, "FAILED_PRECONDITION")
    assert error.hint == "Look elsewhere."
    derive = pipeline_service_pb2.DerivePipelineRequest(source=name)
    refused = daemon.pipelines.DerivePipeline(derive)
    await fails_with(refused, InvalidFieldError, "INVALID_ARGUMENT", field="derivation.task")
    bug = await fails_with(daemon.generate(name, "bug"), InternalError, "INTERNAL")
    assert bug.metadata["request_id"]
    await fails_with(daemon.generate(name, "die"), RequestKillsWorkerError, "FAILED_PRECONDITION")
    dying = pipeline_service_pb2.LoadPipelineRequest(spec=pipeline_service_pb2.PipelineSpec(repo_id="die"))
    lost = await fails_with(daemon.pipelines.LoadPipeline(dying), WorkerLostError, "UNAVAILABLE")
    assert lost.retry_after
    absent_generation = generation_service_pb2.GetGenerationRequest(name="generations/absent")
    await fails_with(daemon.generations.GetGeneration(absent_generation), GenerationNotFoundError, "NOT_FOUND")
    assert len([event async for event in daemon.generate(name)]) > 1


async def test_a_full_queue_is_told_with_the_time_to_wait() -> None:
    async with serving(max_running=1, max_waiting=0) as daemon:
        name = (await daemon.load()).name
        running = daemon.generate(name, "hang")
        await running.read()
        error = await fails_with(daemon.generate(name), QueueFullError, "RESOURCE_EXHAUSTED")
        assert error.retry_after
        running.cancel()


async def test_a_forced_unload_tells_who_was_running(daemon: Daemon) -> None:
    name = (await daemon.load()).name
    running = aiter(daemon.generate(name, "hang"))
    await anext(running)
    await daemon.pipelines.UnloadPipeline(pipeline_service_pb2.UnloadPipelineRequest(name=name, force=True))
    await fails_with(running, PipelineUnloadedError, "ABORTED")


async def test_a_message_over_the_limit_is_refused_with_the_limit(daemon: Daemon) -> None:
    name = (await daemon.load()).name
    for size in (MAX_MESSAGE_BYTES, 3 * MAX_MESSAGE_BYTES):
        image = {"media_type": "image/png", "data": b"x" * size}
        error = await fails_with(daemon.generate(name, image=image), MessageTooLargeError, "RESOURCE_EXHAUSTED")
    assert daemon.executor.sent(Generate) == []
    image = {"media_type": "image/png", "data": b"x" * MAX_MESSAGE_BYTES}
    error, _ = await failure(daemon.generate(name, image=image))
    assert f"{MAX_MESSAGE_BYTES:,}" in error.message
    assert "max_message_bytes" in error.hint


async def test_draining_refuses_new_work(daemon: Daemon) -> None:
    name = (await daemon.load()).name
    await daemon.pool.drain(0)
    error = await fails_with(daemon.generate(name), ShuttingDownError, "UNAVAILABLE")
    assert error.hint


async def test_a_bug_is_logged_under_its_request_id_and_not_told(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(daemon.pool, "list_pipelines", broken)
    with caplog.at_level(logging.INFO):
        error = await fails_with(
            daemon.pipelines.ListPipelines(pipeline_service_pb2.ListPipelinesRequest()), InternalError, "INTERNAL"
        )
    assert "secret" not in str(error)
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert error.metadata["request_id"] in record.getMessage()
    assert "a secret" in caplog.text


async def test_a_long_and_foreign_error_text_still_fits_into_the_headers(daemon: Daemon) -> None:
    name = "ä" * 500
    await fails_with(daemon.generate(name), InvalidFieldError, "INVALID_ARGUMENT", field="pipeline")
    request = pipeline_service_pb2.LoadPipelineRequest(
        spec=pipeline_service_pb2.PipelineSpec(repo_id="a", overrides={"雪" * 1000: pipeline_service_pb2.Override()})
    )
    await failure(daemon.pipelines.LoadPipeline(request))
    assert await daemon.outcome("LoadPipeline") == "invalid_field"


# Updating


async def test_an_update_names_what_it_changes(daemon: Daemon) -> None:
    name = (await daemon.load()).name
    request = pipeline_service_pb2.UpdatePipelineRequest(name=name, update_mask=FieldMask(paths=["noise_scheduler"]))
    request.settings.noise_scheduler.class_name = "EulerDiscreteScheduler"
    request.settings.noise_scheduler.config.entries["steps_offset"].int_value = 1
    response = await daemon.pipelines.UpdatePipeline(request)
    assert response.pipeline.settings == request.settings
    request.ClearField("settings")
    response = await daemon.pipelines.UpdatePipeline(request)
    assert not response.pipeline.settings.HasField("noise_scheduler")


@pytest.mark.parametrize("paths", [[], ["noise_scheduler", "unet"]])
async def test_an_update_of_nothing_or_of_something_else_is_refused(daemon: Daemon, paths: list[str]) -> None:
    request = pipeline_service_pb2.UpdatePipelineRequest(
        name=(await daemon.load()).name, update_mask=FieldMask(paths=paths)
    )
    await fails_with(
        daemon.pipelines.UpdatePipeline(request), InvalidFieldError, "INVALID_ARGUMENT", field="update_mask"
    )


# Callbacks


def start(name: str, prompt: str = "a cat", **callbacks: Any) -> Any:
    pb = generation_service_pb2
    request = pb.GenerateRequest(pipeline=name, prompt=prompt)
    chosen = callbacks or {"callback_on_step_end": pb.Callback(tensor_inputs=["latents"])}
    message = pb.GenerateInteractivelyRequest()
    message.start.request.CopyFrom(request)
    for callback, value in chosen.items():
        message.start.callbacks[callback].CopyFrom(value)
    return message


def reply(**tensors: float) -> Any:
    message = generation_service_pb2.GenerateInteractivelyRequest()
    message.reply.SetInParent()
    for name, value in tensors.items():
        message.reply.tensors[name].double_value = value
    return message


async def test_a_caller_is_asked_at_each_step_and_replies(daemon: Daemon) -> None:
    call = daemon.generations.GenerateInteractively()
    await call.write(start((await daemon.load()).name))
    kinds, steps = [], []
    async for event in call:
        if event.WhichOneof("event") == "step_end":
            steps.append((event.step_end.step, event.step_end.tensors["latents"].double_value))
            assert event.step_end.state["_guidance_scale"].double_value == 7.5
            await call.write(reply(latents=float(event.step_end.step)))
        else:
            kinds.append(event.generate.WhichOneof("event"))
    assert steps == [(0, 0.5), (1, 0.5), (2, 0.5)]
    assert kinds == ["started", "progress", "progress", "progress", "output", "summary"]
    assert [dict(each.tensors) for each in daemon.executor.replies] == [{"latents": step} for step in (0.0, 1.0, 2.0)]


async def test_a_caller_who_leaves_while_asked_ends_the_generation(daemon: Daemon) -> None:
    call = daemon.generations.GenerateInteractively()
    await call.write(start((await daemon.load()).name))
    events = aiter(call)
    assert (await anext(events)).generate.HasField("started")
    assert (await anext(events)).HasField("step_end")
    call.cancel()
    await soon(lambda: daemon.executor.cancelled)
    assert await daemon.outcome("GenerateInteractively") == "cancelled"


async def test_a_caller_who_does_not_reply_in_time_gives_up_its_place() -> None:
    async with serving(callback_timeout=0.05, max_running=1) as daemon:
        name = (await daemon.load()).name
        call = daemon.generations.GenerateInteractively()
        await call.write(start(name))
        error = await fails_with(call, CallbackTimeoutError, "DEADLINE_EXCEEDED")
        assert "callback_on_step_end was asked at step 0" in error.message
        await soon(lambda: daemon.executor.cancelled)
        events = [event async for event in daemon.generate(name)]
        assert events[-1].HasField("summary")


async def test_a_worker_that_dies_while_it_asks_ends_the_call(daemon: Daemon) -> None:
    call = daemon.generations.GenerateInteractively()
    await call.write(start((await daemon.load()).name))
    await anext(aiter(call))
    daemon.executor.kill("workers/0")
    await fails_with(call, WorkerLostError, "UNAVAILABLE")


async def test_a_conversation_has_its_order(daemon: Daemon) -> None:
    name = (await daemon.load()).name
    for messages in ([], [reply()]):
        await fails_with(
            daemon.generations.GenerateInteractively(iter(messages)),
            InvalidFieldError,
            "INVALID_ARGUMENT",
            field="start",
        )
    pb = generation_service_pb2
    nothing_to_ask = pb.GenerateInteractivelyRequest()
    nothing_to_ask.start.request.pipeline = name
    await fails_with(
        daemon.generations.GenerateInteractively(iter([nothing_to_ask])),
        InvalidFieldError,
        "INVALID_ARGUMENT",
        field="start.callbacks",
    )
    for wrong in ([start(name), start(name)], [start(name), pb.GenerateInteractivelyRequest()], [start(name)]):
        await fails_with(
            daemon.generations.GenerateInteractively(iter(wrong)), InvalidFieldError, "INVALID_ARGUMENT", field="reply"
        )
    # Held, so that nothing has been asked yet.
    daemon.executor.hold(Generate)
    call = daemon.generations.GenerateInteractively()
    await call.write(start(name))
    await call.write(reply())
    await fails_with(call, InvalidFieldError, "INVALID_ARGUMENT", field="reply")


async def test_a_caller_may_stop_sending_once_the_last_step_is_answered(daemon: Daemon) -> None:
    call = daemon.generations.GenerateInteractively()
    await call.write(start((await daemon.load()).name))
    answered = 0
    async for event in call:
        if event.HasField("step_end"):
            answered += 1
            await call.write(reply())
            if answered == 3:
                await call.done_writing()
    assert answered == 3


async def test_a_reply_that_is_too_large_ends_the_call(daemon: Daemon) -> None:
    call = daemon.generations.GenerateInteractively()
    await call.write(start((await daemon.load()).name))
    await anext(aiter(call))
    large = reply()
    large.reply.tensors["latents"].string_value = "x" * (MAX_MESSAGE_BYTES + 1)
    await call.write(large)
    await fails_with(call, MessageTooLargeError, "RESOURCE_EXHAUSTED")

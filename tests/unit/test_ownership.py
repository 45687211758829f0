"""What one client has does not exist for another, by any method that there is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from denoised.errors import (
    DenoisedError,
    GenerationNotFoundError,
    NotOwnerError,
    PipelineExistsError,
    PipelineNotFoundError,
    ScopeMissingError,
)
from denoised.v1 import generation_service_pb2 as generation_pb
from denoised.v1 import pipeline_service_pb2 as pipeline_pb
from denoised.v1 import worker_service_pb2 as worker_pb
from denoised.v1.generation_service_pb2_grpc import GenerationServiceStub
from denoised.v1.pipeline_service_pb2_grpc import PipelineServiceStub
from denoised.v1.worker_service_pb2_grpc import WorkerServiceStub
from denoised_server import tokens
from denoised_server.access import Access
from denoised_server.callers import Scope
from denoised_server.tokens import Token
from google.protobuf.field_mask_pb2 import FieldMask

from tests.unit.test_access import EVERYTHING
from tests.unit.test_services import Daemon, failure, reply, serving, start

USUAL = frozenset({Scope.LOAD, Scope.GENERATE, Scope.READ})
NAMES = {"alice": USUAL, "bob": USUAL, "root": frozenset({Scope.ADMIN})}
HERS = "pipelines/hers"
SPEC = pipeline_pb.PipelineSpec(repo_id="weights")
DERIVATION = pipeline_pb.Derivation(task=pipeline_pb.TASK_INPAINTING)


class As:
    """Stubs that show one client's token with every call."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self.pipelines: Any = self._with_token(PipelineServiceStub(self.channel))
        self.generations: Any = self._with_token(GenerationServiceStub(self.channel))
        self.workers: Any = self._with_token(WorkerServiceStub(self.channel))

    def _with_token(self, stub: object) -> object:
        class Authorized:
            def __getattr__(_, method: str) -> Callable[[Any], Any]:  # noqa: N805
                metadata = (("authorization", f"Bearer secret of {self.name}"),)
                return lambda request: getattr(stub, method)(request, metadata=metadata)

        return Authorized()

    async def load(self, **fields: Any) -> pipeline_pb.Pipeline:
        call = self.pipelines.LoadPipeline(pipeline_pb.LoadPipelineRequest(spec=SPEC, **fields))
        loaded: pipeline_pb.Pipeline = [response async for response in call][-1].pipeline
        return loaded

    def generate(self, name: str, prompt: str = "a cat", **fields: Any) -> Any:
        return self.generations.Generate(generation_pb.GenerateRequest(pipeline=name, prompt=prompt, **fields))

    async def watched(self) -> list[pipeline_pb.WatchPipelinesResponse]:
        """What a watch says up to SYNCED."""
        call = self.pipelines.WatchPipelines(pipeline_pb.WatchPipelinesRequest())
        seen: list[pipeline_pb.WatchPipelinesResponse] = []
        while not seen or seen[-1].change != pipeline_pb.WatchPipelinesResponse.CHANGE_SYNCED:
            seen.append(await call.read())
        call.cancel()
        return seen


@dataclass
class Clients:
    """A daemon with alice's pipeline in it, and who calls it."""

    daemon: Daemon
    alice: As
    bob: As
    root: As


@asynccontextmanager
async def clients(*, shared: bool = False) -> AsyncIterator[Clients]:
    known = [Token(name, scopes, tokens.digest(f"secret of {name}")) for name, scopes in NAMES.items()]
    async with serving(Access(lambda: known)) as daemon, AsyncExitStack() as stack:
        callers = {name: As(name, daemon.port) for name in NAMES}
        for caller in callers.values():
            await stack.enter_async_context(caller.channel)
        await callers["alice"].load(pipeline_id="hers", request_id="first", shared=shared)
        yield Clients(daemon, **callers)


async def refused(call: Any) -> DenoisedError:
    error, _ = await failure(call)
    assert "alice" not in f"{error} {error.metadata}"
    return error


async def _converse(client: As, name: str) -> AsyncIterator[generation_pb.GenerateInteractivelyResponse]:
    messages: asyncio.Queue[generation_pb.GenerateInteractivelyRequest] = asyncio.Queue()

    async def sent() -> AsyncIterator[generation_pb.GenerateInteractivelyRequest]:
        while True:
            yield await messages.get()

    messages.put_nowait(start(name))
    async for event in client.generations.GenerateInteractively(sent()):
        if event.HasField("step_end"):
            messages.put_nowait(reply())
        yield event


# The methods that name a pipeline, with the request that names it.
NAMING: dict[str, Callable[[As, str], Any]] = {
    "/denoised.v1.PipelineService/DerivePipeline": lambda client, name: client.pipelines.DerivePipeline(
        pipeline_pb.DerivePipelineRequest(source=name, derivation=DERIVATION)
    ),
    "/denoised.v1.PipelineService/GetPipeline": lambda client, name: client.pipelines.GetPipeline(
        pipeline_pb.GetPipelineRequest(name=name)
    ),
    "/denoised.v1.PipelineService/UpdatePipeline": lambda client, name: client.pipelines.UpdatePipeline(
        pipeline_pb.UpdatePipelineRequest(name=name, update_mask=FieldMask(paths=["noise_scheduler"]))
    ),
    "/denoised.v1.PipelineService/RenewPipeline": lambda client, name: client.pipelines.RenewPipeline(
        pipeline_pb.RenewPipelineRequest(name=name)
    ),
    "/denoised.v1.PipelineService/UnloadPipeline": lambda client, name: client.pipelines.UnloadPipeline(
        pipeline_pb.UnloadPipelineRequest(name=name, force=True)
    ),
    "/denoised.v1.GenerationService/Generate": lambda client, name: client.generations.Generate(
        generation_pb.GenerateRequest(pipeline=name, prompt="a cat")
    ),
    "/denoised.v1.GenerationService/GenerateInteractively": _converse,
    "/denoised.v1.GenerationService/EncodePrompt": lambda client, name: client.generations.EncodePrompt(
        generation_pb.EncodePromptRequest(pipeline=name)
    ),
}
CHANGING = ("RenewPipeline", "UpdatePipeline", "UnloadPipeline")


async def _load(clients: Clients) -> None:
    call = clients.bob.pipelines.LoadPipeline(pipeline_pb.LoadPipelineRequest(spec=SPEC, pipeline_id="hers"))
    assert type(await refused(call)) is PipelineExistsError
    # Her request ids are hers as well.
    loaded = await clients.bob.load(request_id="first")
    assert loaded.name != HERS
    assert loaded.owner == "bob"


async def _plan(clients: Clients) -> None:
    request = pipeline_pb.PlanPipelineRequest(spec=pipeline_pb.PipelineSpec(repo_id="other weights"))
    bobs = await clients.bob.pipelines.PlanPipeline(request)
    # What would leave is said, and whose it is only to whom it belongs.
    assert [list(each.pipelines) for each in bobs.evictions] == [[]]
    assert [list(each.pipelines) for each in (await clients.alice.pipelines.PlanPipeline(request)).evictions] == [
        [HERS]
    ]
    hers = {"unet": pipeline_pb.Override(component=pipeline_pb.ComponentSource(pipeline=HERS, role="unet"))}
    spec = pipeline_pb.PipelineSpec(repo_id="weights", overrides=hers)
    await refused(clients.bob.pipelines.PlanPipeline(pipeline_pb.PlanPipelineRequest(spec=spec)))


async def _list(clients: Clients) -> None:
    found = await clients.bob.pipelines.ListPipelines(pipeline_pb.ListPipelinesRequest())
    assert (list(found.pipelines), found.next_page_token) == ([], "")


async def _watch(clients: Clients) -> None:
    assert len(await clients.bob.watched()) == 1
    watch = clients.bob.pipelines.WatchPipelines(pipeline_pb.WatchPipelinesRequest())
    assert (await watch.read()).change == pipeline_pb.WatchPipelinesResponse.CHANGE_SYNCED
    await clients.alice.pipelines.UnloadPipeline(pipeline_pb.UnloadPipelineRequest(name=HERS))
    await clients.alice.load(pipeline_id="another")
    mine = await clients.bob.load(pipeline_id="mine")
    async with asyncio.timeout(5):
        assert (await watch.read()).pipeline.name == mine.name


async def _workers(clients: Clients) -> None:
    response = await clients.bob.workers.ListWorkers(worker_pb.ListWorkersRequest())
    assert "alice" not in str(response)
    assert HERS not in str(response)


async def _watch_workers(clients: Clients) -> None:
    watch = clients.bob.workers.WatchWorkers(worker_pb.WatchWorkersRequest())
    response = await watch.read()
    watch.cancel()
    assert "alice" not in str(response)
    assert HERS not in str(response)


async def _info(clients: Clients) -> None:
    response = await clients.bob.workers.GetServerInfo(worker_pb.GetServerInfoRequest())
    assert "alice" not in str(response)
    assert HERS not in str(response)


GENERATION_NAMING: dict[str, Callable[[As, str], Any]] = {
    "/denoised.v1.GenerationService/GetGeneration": lambda client, name: client.generations.GetGeneration(
        generation_pb.GetGenerationRequest(name=name)
    ),
    "/denoised.v1.GenerationService/CancelGeneration": lambda client, name: client.generations.CancelGeneration(
        generation_pb.CancelGenerationRequest(name=name)
    ),
    "/denoised.v1.GenerationService/ResumeGeneration": lambda client, name: client.generations.ResumeGeneration(
        generation_pb.ResumeGenerationRequest(name=name)
    ),
}


async def _submit(client: As) -> str:
    """Starts a detached generation, under a request id that others may use too; returns its name."""
    detached = generation_pb.ON_DISCONNECT_DETACH
    request = generation_pb.GenerateRequest(pipeline=HERS, prompt="a cat", on_disconnect=detached, request_id="first")
    events = [event async for event in client.generations.Generate(request)]
    name: str = events[0].started.name
    return name


def _naming_generation(attempt: Callable[[As, str], Any]) -> Callable[[Clients], Awaitable[None]]:
    async def check(clients: Clients) -> None:
        name = await _submit(clients.alice)
        hers = await refused(attempt(clients.bob, name))
        nothing = await refused(attempt(clients.bob, "generations/none"))
        assert type(hers) is type(nothing) is GenerationNotFoundError
        assert str(hers) == str(nothing).replace("generations/none", name)

    return check


async def _list_generations(clients: Clients) -> None:
    name = await _submit(clients.alice)
    request = generation_pb.ListGenerationsRequest()
    assert list((await clients.bob.generations.ListGenerations(request)).generations) == []
    assert [one.name for one in (await clients.alice.generations.ListGenerations(request)).generations] == [name]
    assert [one.name for one in (await clients.root.generations.ListGenerations(request)).generations] == [name]


def _naming(attempt: Callable[[As, str], Any]) -> Callable[[Clients], Awaitable[None]]:
    async def check(clients: Clients) -> None:
        hers = await refused(attempt(clients.bob, HERS))
        nothing = await refused(attempt(clients.bob, "pipelines/none"))
        assert type(hers) is type(nothing) is PipelineNotFoundError
        # Not even by the words can one tell the two apart.
        assert str(hers) == str(nothing).replace("pipelines/none", HERS)

    return check


def _naming_worker(attempt: Callable[[As], Any]) -> Callable[[Clients], Awaitable[None]]:
    async def check(clients: Clients) -> None:
        assert type(await refused(attempt(clients.bob))) is ScopeMissingError
        assert HERS not in str(await attempt(clients.root))

    return check


ATTEMPTS: dict[str, Callable[[Clients], Awaitable[None]]] = {
    "/denoised.v1.PipelineService/LoadPipeline": _load,
    "/denoised.v1.PipelineService/PlanPipeline": _plan,
    "/denoised.v1.PipelineService/ListPipelines": _list,
    "/denoised.v1.PipelineService/WatchPipelines": _watch,
    "/denoised.v1.WorkerService/ListWorkers": _workers,
    "/denoised.v1.WorkerService/WatchWorkers": _watch_workers,
    "/denoised.v1.WorkerService/GetServerInfo": _info,
    "/denoised.v1.WorkerService/DrainWorker": _naming_worker(
        lambda client: client.workers.DrainWorker(worker_pb.DrainWorkerRequest(name="workers/0"))
    ),
    "/denoised.v1.WorkerService/ResumeWorker": _naming_worker(
        lambda client: client.workers.ResumeWorker(worker_pb.ResumeWorkerRequest(name="workers/0"))
    ),
    "/denoised.v1.GenerationService/ListGenerations": _list_generations,
}
ATTEMPTS |= {method: _naming(attempt) for method, attempt in NAMING.items()}
ATTEMPTS |= {method: _naming_generation(attempt) for method, attempt in GENERATION_NAMING.items()}


def test_no_method_is_left_out() -> None:
    """Who adds a method says here how another client is kept from what is not its own."""
    assert set(ATTEMPTS) == EVERYTHING


@pytest.mark.parametrize("method", sorted(EVERYTHING))
async def test_another_clients_pipeline_does_not_exist(method: str) -> None:
    async with clients() as all_of_them:
        await ATTEMPTS[method](all_of_them)
        names = [view.name for view in all_of_them.daemon.pool.list_pipelines(page_size=0, page_token="")[0]]
        assert HERS in names or method.endswith("WatchPipelines"), "it is still there"


@pytest.mark.parametrize("method", sorted(NAMING))
async def test_what_is_shared_may_be_used_and_not_changed(method: str) -> None:
    async with clients(shared=True) as all_of_them:
        call = NAMING[method](all_of_them.bob, HERS)
        if method.endswith(CHANGING):
            assert type(await refused(call)) is NotOwnerError
        else:
            response = [event async for event in call] if hasattr(call, "__aiter__") else await call
            assert "alice" not in str(response)


@pytest.mark.parametrize("method", sorted(NAMING))
async def test_an_admin_may_do_with_it_what_its_owner_may(method: str) -> None:
    async with clients() as all_of_them:
        outcomes: list[Any] = []
        for client in (all_of_them.root, all_of_them.alice):
            call = NAMING[method](client, HERS)
            try:
                outcomes.append(
                    len([event async for event in call]) if hasattr(call, "__aiter__") else type(await call)
                )
            except grpc.aio.AioRpcError as error:
                outcomes.append(error.code())
        if method.endswith("UnloadPipeline"):
            assert outcomes == [pipeline_pb.UnloadPipelineResponse] * 2
        assert outcomes[0] == outcomes[1]
        assert outcomes[0] is not grpc.StatusCode.NOT_FOUND


async def test_what_is_shared_is_listed_and_watched_without_its_owners_name() -> None:
    async with clients(shared=True) as all_of_them:
        found = await all_of_them.bob.pipelines.ListPipelines(pipeline_pb.ListPipelinesRequest())
        assert [(pipeline.name, pipeline.owner, pipeline.shared) for pipeline in found.pipelines] == [(HERS, "", True)]
        assert [response.pipeline.name for response in await all_of_them.bob.watched()] == [HERS, ""]
        found = await all_of_them.root.pipelines.ListPipelines(pipeline_pb.ListPipelinesRequest())
        assert [pipeline.owner for pipeline in found.pipelines] == ["alice"]
        joined = await all_of_them.bob.load(pipeline_id="hers")
        assert (joined.name, joined.owner) == (HERS, "")


async def test_what_is_derived_from_a_shared_pipeline_belongs_to_who_derived_it() -> None:
    async with clients(shared=True) as all_of_them:
        request = pipeline_pb.DerivePipelineRequest(source=HERS, derivation=DERIVATION)
        derived = (await all_of_them.bob.pipelines.DerivePipeline(request)).pipeline
        assert (derived.owner, derived.shared, derived.exclusive_bytes) == ("bob", False, 0)
        unload = pipeline_pb.UnloadPipelineRequest(name=derived.name)
        assert type(await refused(all_of_them.alice.pipelines.UnloadPipeline(unload))) is PipelineNotFoundError
        await all_of_them.bob.pipelines.UnloadPipeline(unload)
        # That it was there is known to nobody else either.
        assert type(await refused(all_of_them.alice.pipelines.UnloadPipeline(unload))) is PipelineNotFoundError
        await all_of_them.bob.pipelines.UnloadPipeline(unload)

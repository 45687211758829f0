"""The gRPC services: a proto in, the pool, a proto out. What goes wrong is the interceptor's to tell."""

# ruff: noqa: N802 - methods are named as in the protos.

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
from denoised.v1 import generation_service_pb2 as generation_pb
from denoised.v1 import pipeline_service_pb2 as pipeline_pb
from denoised.v1 import worker_service_pb2 as worker_pb
from denoised.v1.generation_service_pb2_grpc import (
    GenerationServiceServicer,
    add_GenerationServiceServicer_to_server,
)
from denoised.v1.pipeline_service_pb2_grpc import PipelineServiceServicer, add_PipelineServiceServicer_to_server
from denoised.v1.worker_service_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server
from denoised.version import __version__

from . import requests, responses
from .pool import Pool

_DESCRIPTORS = tuple(
    module.DESCRIPTOR.services_by_name[name]
    for module, name in (
        (pipeline_pb, "PipelineService"),
        (generation_pb, "GenerationService"),
        (worker_pb, "WorkerService"),
    )
)
SERVICES = tuple(service.full_name for service in _DESCRIPTORS)
METHODS = tuple(method.name for service in _DESCRIPTORS for method in service.methods)


class PipelineService(PipelineServiceServicer):
    """Keeps pipelines."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def LoadPipeline(
        self, request: pipeline_pb.LoadPipelineRequest, context: Any
    ) -> AsyncIterator[pipeline_pb.LoadPipelineResponse]:
        async with aclosing(
            self._pool.load(
                requests.spec(request),
                requests.lease(request),
                requests.access(request),
                left=context.time_remaining(),
            )
        ) as events:
            async for event in events:
                yield responses.load_response(event)

    async def PlanPipeline(
        self, request: pipeline_pb.PlanPipelineRequest, context: Any
    ) -> pipeline_pb.PlanPipelineResponse:
        return responses.plan(await self._pool.plan(requests.spec(request), requests.plan_access(request)))

    async def DerivePipeline(
        self, request: pipeline_pb.DerivePipelineRequest, context: Any
    ) -> pipeline_pb.DerivePipelineResponse:
        view = await self._pool.derive(
            request.source, requests.derivation(request), requests.lease(request), requests.access(request)
        )
        return pipeline_pb.DerivePipelineResponse(pipeline=responses.pipeline(view))

    async def GetPipeline(
        self, request: pipeline_pb.GetPipelineRequest, context: Any
    ) -> pipeline_pb.GetPipelineResponse:
        return pipeline_pb.GetPipelineResponse(pipeline=responses.pipeline(self._pool.get(request.name)))

    async def ListPipelines(
        self, request: pipeline_pb.ListPipelinesRequest, context: Any
    ) -> pipeline_pb.ListPipelinesResponse:
        views, token = self._pool.list_pipelines(page_size=request.page_size, page_token=request.page_token)
        return pipeline_pb.ListPipelinesResponse(pipelines=map(responses.pipeline, views), next_page_token=token)

    async def WatchPipelines(
        self, request: pipeline_pb.WatchPipelinesRequest, context: Any
    ) -> AsyncIterator[pipeline_pb.WatchPipelinesResponse]:
        async with aclosing(self._pool.watch()) as changes:
            async for change in changes:
                yield responses.watch_response(change)

    async def UpdatePipeline(
        self, request: pipeline_pb.UpdatePipelineRequest, context: Any
    ) -> pipeline_pb.UpdatePipelineResponse:
        view = await self._pool.update(request.name, requests.update(request))
        return pipeline_pb.UpdatePipelineResponse(pipeline=responses.pipeline(view))

    async def RenewPipeline(
        self, request: pipeline_pb.RenewPipelineRequest, context: Any
    ) -> pipeline_pb.RenewPipelineResponse:
        return pipeline_pb.RenewPipelineResponse(
            pipeline=responses.pipeline(
                await self._pool.renew(
                    request.name, requests.ttl(request), requests.pinned(request), requests.keep_alive(request)
                )
            )
        )

    async def UnloadPipeline(
        self, request: pipeline_pb.UnloadPipelineRequest, context: Any
    ) -> pipeline_pb.UnloadPipelineResponse:
        return pipeline_pb.UnloadPipelineResponse(
            freed_bytes=await self._pool.unload(request.name, force=request.force)
        )


class GenerationService(GenerationServiceServicer):
    """Runs pipelines."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def Generate(
        self, request: generation_pb.GenerateRequest, context: Any
    ) -> AsyncIterator[generation_pb.GenerateResponse]:
        command = requests.generate(request, context.time_remaining())
        async with aclosing(self._pool.generate(command, requests.terms(request))) as events:
            async for event in events:
                yield responses.generate_response(event)

    async def GenerateInteractively(
        self, request_iterator: AsyncIterator[generation_pb.GenerateInteractivelyRequest], context: Any
    ) -> AsyncIterator[generation_pb.GenerateInteractivelyResponse]:
        messages = aiter(request_iterator)
        command, terms = requests.start(await anext(messages, None), context.time_remaining())
        async with aclosing(self._pool.generate(command, terms, requests.replies(messages))) as events:
            async for event in events:
                yield responses.interactive_response(event)

    async def EncodePrompt(
        self, request: generation_pb.EncodePromptRequest, context: Any
    ) -> generation_pb.EncodePromptResponse:
        command = requests.encode_prompt(request, context.time_remaining())
        async with aclosing(self._pool.generate(command)) as events:
            return responses.encode_prompt_response([entry.event async for entry in events])

    async def ResumeGeneration(
        self, request: generation_pb.ResumeGenerationRequest, context: Any
    ) -> AsyncIterator[generation_pb.ResumeGenerationResponse]:
        async with aclosing(self._pool.resume_generation(request.name, request.after_sequence)) as events:
            async for event in events:
                yield generation_pb.ResumeGenerationResponse(event=responses.generate_response(event))

    async def GetGeneration(
        self, request: generation_pb.GetGenerationRequest, context: Any
    ) -> generation_pb.GetGenerationResponse:
        view = self._pool.get_generation(request.name)
        return generation_pb.GetGenerationResponse(generation=responses.generation(view))

    async def ListGenerations(
        self, request: generation_pb.ListGenerationsRequest, context: Any
    ) -> generation_pb.ListGenerationsResponse:
        views, token = self._pool.list_generations(page_size=request.page_size, page_token=request.page_token)
        return generation_pb.ListGenerationsResponse(
            generations=map(responses.generation, views), next_page_token=token
        )

    async def CancelGeneration(
        self, request: generation_pb.CancelGenerationRequest, context: Any
    ) -> generation_pb.CancelGenerationResponse:
        view = self._pool.cancel_generation(request.name)
        return generation_pb.CancelGenerationResponse(generation=responses.generation(view))


class WorkerService(WorkerServiceServicer):
    """Shows the processes behind the daemon, and takes them out of work.

    The keyword arguments are what it says the daemon accepts.
    """

    def __init__(self, pool: Pool, *, max_message_bytes: int, max_pixels: int, max_waiting: int) -> None:
        self._pool = pool
        self._max_message_bytes = max_message_bytes
        self._max_pixels = max_pixels
        self._max_waiting = max_waiting
        self._start_time = time.time()

    async def ListWorkers(self, request: worker_pb.ListWorkersRequest, context: Any) -> worker_pb.ListWorkersResponse:
        views, token = self._pool.list_workers(page_size=request.page_size, page_token=request.page_token)
        return worker_pb.ListWorkersResponse(workers=map(responses.worker, views), next_page_token=token)

    async def DrainWorker(self, request: worker_pb.DrainWorkerRequest, context: Any) -> worker_pb.DrainWorkerResponse:
        return worker_pb.DrainWorkerResponse(worker=responses.worker(await self._pool.drain_worker(request.name)))

    async def ResumeWorker(
        self, request: worker_pb.ResumeWorkerRequest, context: Any
    ) -> worker_pb.ResumeWorkerResponse:
        return worker_pb.ResumeWorkerResponse(worker=responses.worker(self._pool.resume_worker(request.name)))

    async def WatchWorkers(
        self, request: worker_pb.WatchWorkersRequest, context: Any
    ) -> AsyncIterator[worker_pb.WatchWorkersResponse]:
        async with aclosing(self._pool.watch_workers(requests.watch_interval(request))) as views:
            async for view in views:
                yield worker_pb.WatchWorkersResponse(worker=responses.worker(view))

    async def GetServerInfo(
        self, request: worker_pb.GetServerInfoRequest, context: Any
    ) -> worker_pb.GetServerInfoResponse:
        workers, _ = self._pool.list_workers(page_size=1, page_token="")
        # Before they are up, nobody knows.
        ready = workers[0].ready if workers else None
        report = self._pool.health()
        return worker_pb.GetServerInfoResponse(
            version=__version__,
            library_versions=ready.library_versions if ready else {},
            start_time=responses.timestamp(self._start_time),
            embedded_models=ready.embedded_models if ready else (),
            max_message_bytes=self._max_message_bytes,
            max_pixels=self._max_pixels,
            max_waiting=self._max_waiting,
            health=responses.HEALTHS[report.health],
            health_reasons=report.reasons,
        )


def add_services(
    server: grpc.aio.Server, pool: Pool, *, max_message_bytes: int, max_pixels: int, max_waiting: int
) -> None:
    """Adds all of them."""
    add_PipelineServiceServicer_to_server(PipelineService(pool), server)
    add_GenerationServiceServicer_to_server(GenerationService(pool), server)
    workers = WorkerService(pool, max_message_bytes=max_message_bytes, max_pixels=max_pixels, max_waiting=max_waiting)
    add_WorkerServiceServicer_to_server(workers, server)

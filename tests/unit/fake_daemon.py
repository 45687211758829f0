"""A daemon that works, over real sockets, and is small: it keeps handles, and its pictures have one colour."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Generator, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any, Self

import grpc
import numpy as np
from denoised import errors, media, status, values
from denoised.v1 import (
    artifact_pb2,
    generation_service_pb2,
    generation_service_pb2_grpc,
    pipeline_service_pb2,
    pipeline_service_pb2_grpc,
    worker_service_pb2,
    worker_service_pb2_grpc,
)
from google.protobuf import duration_pb2
from PIL import Image

MAX_MESSAGE_BYTES = 64 * 2**20
DEFAULT_SEED = 1234
COMPONENTS = (
    ("text_encoder", "CLIPTextModel", 1000),
    ("unet", "UNet2DConditionModel", 9000),
    ("vae", "AutoencoderKL", 0),
)
PARAMETERS = ("prompt", "image", "mask_image", "height", "width", "num_inference_steps", "guidance_scale", "eta")
TYPED = (
    "negative_prompt",
    "strength",
    "num_images_per_prompt",
    "latents",
    "clip_skip",
    "cross_attention_kwargs",
    "sigmas",
)
CLASSES = {
    pipeline_service_pb2.TASK_TEXT_TO_IMAGE: "StableDiffusionPipeline",
    pipeline_service_pb2.TASK_IMAGE_TO_IMAGE: "StableDiffusionImg2ImgPipeline",
    pipeline_service_pb2.TASK_INPAINTING: "StableDiffusionInpaintPipeline",
}


class FakeDaemon(
    pipeline_service_pb2_grpc.PipelineServiceServicer,
    generation_service_pb2_grpc.GenerationServiceServicer,
    worker_service_pb2_grpc.WorkerServiceServicer,
):
    """Knows the repositories "demo" and "text-only"; the second has text-to-image alone.

    Attributes:
        target: Where it listens.
        requests: Every request so far.
        replies: What callbacks replied.
        metadata: Metadata of the last call.
        cancelled: Set when a caller left a generation that was running.
        step_seconds: How long a denoising step takes.
        queue_positions: Positions a generation reports before it runs.
        fields: Further fields of a generation's result.
        failure: Raised once by the next call.
        drops: How many calls to fail as a broken connection would.
        page_size: Pipelines on one page.
    """

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.replies: list[Any] = []
        self.metadata: dict[str, Any] = {}
        self.cancelled = threading.Event()
        self.step_seconds = 0.0
        self.queue_positions: list[int] = []
        self.fields: dict[str, values.Plain] = {}
        self.failure: errors.DenoisedError | None = None
        self.drops = 0
        self.page_size = 2
        self.changed = threading.Event()
        self.generations: dict[str, generation_service_pb2.Generation] = {}
        self.events: dict[str, list[generation_service_pb2.GenerateResponse]] = {}
        self._pipelines: dict[str, pipeline_service_pb2.Pipeline] = {}
        self._gone: set[str] = set()
        limit = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.max_send_message_length", -1)]
        self._server = grpc.server(futures.ThreadPoolExecutor(16), options=[*limit, ("grpc.so_reuseport", 0)])
        pipeline_service_pb2_grpc.add_PipelineServiceServicer_to_server(self, self._server)
        generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(self, self._server)
        worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(self, self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.changed.set()
        self._server.stop(0).wait()

    @property
    def names(self) -> list[str]:
        return list(self._pipelines)

    def last(self, kind: type[Any]) -> Any:
        """The last request of that kind."""
        return next(request for request in reversed(self.requests) if isinstance(request, kind))

    @contextmanager
    def _answering(self, request: Any, context: Any) -> Iterator[None]:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        if self.drops:
            self.drops -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "the line is bad")
        try:
            if (failure := self.failure) is not None:
                self.failure = None
                raise failure
            yield
        except errors.DenoisedError as error:
            context.set_trailing_metadata([(status.DETAILS_KEY, status.to_details(error))])
            context.abort(getattr(grpc.StatusCode, error.code), str(error))

    # Pipelines

    def LoadPipeline(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        with self._answering(request, context):
            if request.spec.repo_id not in ("demo", "text-only"):
                raise errors.RepoNotFoundError(f"There is no {request.spec.repo_id!r}.", hint="Try demo.")
            for completed in (0, 5000, 10000):
                progress = pipeline_service_pb2.LoadProgress(
                    phase="reading weights", role="unet", completed_bytes=completed, total_bytes=10000
                )
                yield pipeline_service_pb2.LoadPipelineResponse(progress=progress)
            yield pipeline_service_pb2.LoadPipelineResponse(
                pipeline=self._add(request, request.spec, request.spec.task or 1, request.spec.overrides)
            )

    def PlanPipeline(self, request: Any, context: Any) -> Any:  # noqa: N802
        with self._answering(request, context):
            if request.spec.repo_id != "demo":
                raise errors.RepoNotFoundError(f"There is no {request.spec.repo_id!r}.", hint="Try demo.")
            pb = pipeline_service_pb2
            is_large = request.spec.dtype == artifact_pb2.DATA_TYPE_FLOAT64
            return pb.PlanPipelineResponse(
                outcome=pb.PlanPipelineResponse.OUTCOME_NO_ROOM if is_large else pb.PlanPipelineResponse.OUTCOME_EVICTS,
                worker="workers/0",
                components=[
                    pb.PlannedComponent(
                        role=role,
                        class_name=class_name,
                        digest=f"sha256:{role}",
                        weight_bytes=size,
                        dtype=artifact_pb2.DATA_TYPE_FLOAT16,
                        file_bytes={"F32": 2 * size},
                        held=role == "text_encoder",
                    )
                    for role, class_name, size in COMPONENTS
                    if size
                ],
                new_bytes=9000,
                shared_bytes=1000,
                free_bytes=4000,
                evictable_bytes=6000,
                budget_bytes=20_000,
                evictions=[
                    pb.PlannedEviction(
                        digest="sha256:old",
                        class_name="FluxTransformer2DModel",
                        freed_bytes=6000,
                        pipelines=["pipelines/a"],
                    )
                ],
                download_bytes=18_000,
                expected_load_duration=duration_pb2.Duration(seconds=2),
            )

    def DerivePipeline(self, request: Any, context: Any) -> Any:  # noqa: N802
        with self._answering(request, context):
            source = self._find(request.source)
            task = request.derivation.task
            if source.spec.repo_id == "text-only" and task != pipeline_service_pb2.TASK_TEXT_TO_IMAGE:
                raise errors.TaskNotSupportedError("There is no class for this task.")
            info = self._add(request, source.spec, task, request.derivation.overrides)
            info.source = source.name
            return pipeline_service_pb2.DerivePipelineResponse(pipeline=info)

    def GetPipeline(self, request: Any, context: Any) -> Any:  # noqa: N802
        with self._answering(request, context):
            return pipeline_service_pb2.GetPipelineResponse(pipeline=self._find(request.name))

    def ListPipelines(self, request: Any, context: Any) -> Any:  # noqa: N802
        with self._answering(request, context):
            start = int(request.page_token or 0)
            end = start + self.page_size
            names = self.names
            return pipeline_service_pb2.ListPipelinesResponse(
                pipelines=[self._find(name) for name in names[start:end]],
                next_page_token=str(end) if end < len(names) else "",
            )

    def WatchPipelines(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        with self._answering(request, context):
            response = pipeline_service_pb2.WatchPipelinesResponse
            context.add_callback(self.changed.set)
            context.add_callback(self.cancelled.set)
            for name in self.names:
                yield response(change=response.CHANGE_ADDED, pipeline=self._find(name))
            yield response(change=response.CHANGE_SYNCED)
            self.changed.wait(30)

    def RenewPipeline(self, request: Any, context: Any) -> Any:  # noqa: N802
        with self._answering(request, context):
            info = self._find(request.name)
            info.expire_time.FromSeconds(int(time.time()) + (request.ttl.seconds or 600))
            return pipeline_service_pb2.RenewPipelineResponse(pipeline=info)

    def UpdatePipeline(self, request: Any, context: Any) -> Any:  # noqa: N802
        with self._answering(request, context):
            info, wanted = self._find(request.name), request.settings.noise_scheduler
            if wanted.class_name and not wanted.class_name.endswith("Scheduler"):
                raise errors.InvalidNoiseSchedulerError(f"There is no noise scheduler {wanted.class_name!r}.")
            if request.settings.HasField("noise_scheduler"):
                made = info.settings.noise_scheduler
                made.CopyFrom(info.noise_scheduler)
                made.class_name = wanted.class_name or made.class_name
                if wanted.HasField("config"):
                    made.config.CopyFrom(wanted.config)
                made.config.MergeFrom(artifact_pb2.MapValue(entries=wanted.overrides))
                made.config.entries["_class_name"].string_value = made.class_name
            else:
                info.ClearField("settings")
            info.noise_scheduler.CopyFrom(info.settings.noise_scheduler if info.HasField("settings") else _scheduler())
            return pipeline_service_pb2.UpdatePipelineResponse(pipeline=info)

    def UnloadPipeline(self, request: Any, context: Any) -> Any:  # noqa: N802
        with self._answering(request, context):
            if request.name in self._gone:
                return pipeline_service_pb2.UnloadPipelineResponse()
            freed = self._find(request.name).exclusive_bytes
            del self._pipelines[request.name]
            self._gone.add(request.name)
            return pipeline_service_pb2.UnloadPipelineResponse(freed_bytes=freed)

    def _add(self, request: Any, spec: Any, task: int, overrides: Any) -> Any:
        name = f"pipelines/{request.pipeline_id or f'p{len(self._pipelines) + len(self._gone)}'}"
        info = pipeline_service_pb2.Pipeline(
            name=name,
            spec=spec,
            task=task,  # type: ignore[arg-type]
            pipeline_class=CLASSES[task],  # type: ignore[index]
            state=pipeline_service_pb2.Pipeline.STATE_ACTIVE,
            residency=pipeline_service_pb2.RESIDENCY_HOST,
            device_bytes=6000,
            host_bytes=4000,
            worker="workers/0",
            parameters=[pipeline_service_pb2.Parameter(name=name) for name in (*PARAMETERS, *TYPED)],
            noise_scheduler=_scheduler(),
        )
        for entry, value in {"_class_name": CLASSES[task], "safety_checker": [None, None], "tokens": [1, 2]}.items():  # type: ignore[index]
            info.configuration.pipeline[entry].CopyFrom(values.to_proto(value))
        for role, class_name, _ in COMPONENTS:
            info.configuration.pipeline[role].CopyFrom(values.to_proto(["diffusers", class_name]))
        info.configuration.components["unet"].entries["sample_size"].int_value = 8
        if task == pipeline_service_pb2.TASK_TEXT_TO_IMAGE:
            for parameter in ("prompt", "device", "clip_skip", "dtype"):
                info.encode_prompt_parameters.add(name=parameter)
        info.spec.dtype = info.spec.dtype or artifact_pb2.DATA_TYPE_FLOAT32
        for role, class_name, size in COMPONENTS:
            if role in overrides and overrides[role].value.HasField("null_value"):
                continue
            digest = hashlib.sha256(f"{spec.repo_id} {role} {info.spec.dtype}".encode()).hexdigest()
            dtype = info.spec.dtype if size else artifact_pb2.DATA_TYPE_UNSPECIFIED
            info.components.add(role=role, class_name=class_name, digest=digest, weight_bytes=size, dtype=dtype)
        info.create_time.GetCurrentTime()
        info.last_use_time.GetCurrentTime()
        info.expire_time.FromSeconds(int(time.time()) + (request.ttl.seconds or 600))
        self._pipelines[name] = info
        return self._find(name)

    def _find(self, name: str) -> Any:
        if name not in self._pipelines:
            raise errors.PipelineNotFoundError(f"There is no {name}.", hint="`denoised ps` lists those there are.")
        info = self._pipelines[name]
        info.exclusive_bytes = info.shared_bytes = 0
        for part in info.components:
            used_by = [
                other for other in self._pipelines.values() for one in other.components if one.digest == part.digest
            ]
            part.sharer_count = len(used_by)
            if part.sharer_count > 1:
                info.shared_bytes += part.weight_bytes
            else:
                info.exclusive_bytes += part.weight_bytes
        return info

    # Generations

    def GenerateInteractively(self, request_iterator: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        pb = generation_service_pb2
        start = next(request_iterator).start

        def ask(step: int) -> Generator[Any, None, bool]:
            for name, callback in start.callbacks.items():
                if name == "callback" and step % callback.period:
                    continue
                step_end = pb.StepEnd(callback=name, step=step)
                numbers = np.full((1, 4, 2, 2), step, np.float32)
                latents = values.Artifact(values.TENSOR, numbers.tobytes(), "float32", numbers.shape)
                for tensor in callback.tensor_inputs:
                    step_end.tensors[tensor].CopyFrom(values.to_proto(latents))
                step_end.timestep.int_value = 999 - step
                step_end.state["_guidance_scale"].double_value = step_end.state["guidance_scale"].double_value = 7.5
                step_end.state["_interrupt"].bool_value = False
                yield pb.GenerateInteractivelyResponse(step_end=step_end)
                self.replies.append(next(request_iterator).reply)
            state = self.replies[-1].state
            return "_interrupt" in state and bool(state["_interrupt"].bool_value)

        for event in self.Generate(start.request, context, ask):
            is_ours = isinstance(event, pb.GenerateInteractivelyResponse)
            yield event if is_ours else pb.GenerateInteractivelyResponse(generate=event)

    def Generate(self, request: Any, context: Any, ask: Any = None) -> Iterator[Any]:  # noqa: N802
        response = generation_service_pb2.GenerateResponse
        with self._answering(request, context):
            ended = threading.Event()
            context.add_callback(lambda: None if ended.is_set() else self.cancelled.set())
            self._find(request.pipeline)
            for name in request.arguments:
                if name not in (*PARAMETERS, *TYPED):
                    raise errors.UnknownArgumentError(f"There is no argument {name!r}.", metadata={"suggestion": "eta"})
            for position in self.queue_positions:
                yield response(queued=generation_service_pb2.Queued(position=position))
            steps = request.sampling.num_inference_steps or 4
            for step in range(steps):
                time.sleep(self.step_seconds)
                if ask is not None and (yield from ask(step)):
                    break
                yield response(progress=generation_service_pb2.Progress(completed_steps=step + 1, total_steps=steps))
                if request.HasField("preview") and (step + 1) % request.preview.step_interval == 0:
                    yield response(preview=_preview(step + 1, steps))
            seeds = [] if request.sampling.generators else list(request.sampling.seeds) or [DEFAULT_SEED]
            for output in _paint(request, seeds):
                yield response(output=output)
            summary = generation_service_pb2.Summary(call_count=steps, joined_call_count=1, max_joined_requests=2)
            summary.run_duration.FromMilliseconds(1500)
            summary.seeds.extend(seeds)
            summary.generators.extend(_advance(generator) for generator in request.sampling.generators)
            for name, value in self.fields.items():
                summary.fields[name].CopyFrom(values.to_proto(value))
            ended.set()
            yield response(summary=summary)

    def EncodePrompt(self, request: Any, context: Any) -> Any:  # noqa: N802
        with self._answering(request, context):
            self._find(request.pipeline)
            numbers = np.ones((1, 2, 3), np.float32)
            embeds = values.Artifact(values.TENSOR, numbers.tobytes(), "float32", numbers.shape)
            return generation_service_pb2.EncodePromptResponse(
                values=[values.to_proto(embeds), values.to_proto(None)], is_tuple=True
            )

    def ResumeGeneration(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        with self._answering(request, context):
            self._find_generation(request.name)
            for event in self.events[request.name]:
                if event.sequence > request.after_sequence:
                    yield generation_service_pb2.ResumeGenerationResponse(event=event)

    def GetGeneration(self, request: Any, context: Any) -> Any:  # noqa: N802
        with self._answering(request, context):
            return generation_service_pb2.GetGenerationResponse(generation=self._find_generation(request.name))

    def ListGenerations(self, request: Any, context: Any) -> Any:  # noqa: N802
        with self._answering(request, context):
            return generation_service_pb2.ListGenerationsResponse(generations=self.generations.values())

    def CancelGeneration(self, request: Any, context: Any) -> Any:  # noqa: N802
        with self._answering(request, context):
            generation = self._find_generation(request.name)
            generation.state = generation_service_pb2.Generation.STATE_CANCELLED
            return generation_service_pb2.CancelGenerationResponse(generation=generation)

    def _find_generation(self, name: str) -> Any:
        if name not in self.generations:
            raise errors.GenerationNotFoundError(f"There is no {name}.")
        return self.generations[name]

    # Workers

    def ListWorkers(self, request: Any, context: Any) -> Any:  # noqa: N802
        with self._answering(request, context):
            worker = worker_service_pb2.Worker(
                name="workers/0", state=worker_service_pb2.Worker.STATE_ACTIVE, device="cpu", pid=7, restart_count=1
            )
            worker.memory.weight_bytes, worker.memory.budget_bytes = 10_000, 20_000
            worker.memory.total_bytes, worker.memory.working_set_bytes = 40_000, 10_000
            worker.memory.cached_bytes, worker.memory.unaccounted_bytes = 4_000, 2_000
            worker.engine.call_count, worker.engine.joined_call_count = 4, 3
            stats = worker.engine.methods.add(method="UNet.forward", call_count=4, joined_call_count=3)
            stats.lone_call_counts["unmatched"] = 1
            return worker_service_pb2.ListWorkersResponse(workers=[worker])

    def DrainWorker(self, request: Any, context: Any) -> Any:  # noqa: N802
        with self._answering(request, context):
            worker = worker_service_pb2.Worker(name=request.name, state=worker_service_pb2.Worker.STATE_DRAINING)
            return worker_service_pb2.DrainWorkerResponse(worker=worker)

    def ResumeWorker(self, request: Any, context: Any) -> Any:  # noqa: N802
        with self._answering(request, context):
            worker = worker_service_pb2.Worker(name=request.name, state=worker_service_pb2.Worker.STATE_ACTIVE)
            return worker_service_pb2.ResumeWorkerResponse(worker=worker)

    def WatchWorkers(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        with self._answering(request, context):
            for running in range(2):
                worker = worker_service_pb2.Worker(name="workers/0", running_count=running)
                yield worker_service_pb2.WatchWorkersResponse(worker=worker)

    def GetServerInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
        with self._answering(request, context):
            return worker_service_pb2.GetServerInfoResponse(version="9.9", embedded_models=["demo"])


def _scheduler() -> artifact_pb2.NoiseScheduler:
    scheduler = artifact_pb2.NoiseScheduler(class_name="DDIMScheduler")
    config: dict[str, values.Plain] = {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085,
        "steps_offset": 1,
        "clip_sample": False,
    }
    for name, value in config.items():
        scheduler.config.entries[name].CopyFrom(values.to_proto(value))
    return scheduler


def colour(seed: int) -> tuple[int, int, int]:
    """The colour of a picture."""
    return seed % 256, seed // 256 % 256, 200


def _preview(step: int, steps: int) -> generation_service_pb2.Preview:
    artifact = values.artifact_to_proto(media.pack_image(Image.new("RGB", (8, 8), colour(step)), "image/jpeg"))
    return generation_service_pb2.Preview(completed_steps=step, total_steps=steps, artifact=artifact)


def _paint(request: Any, seeds: list[int]) -> Iterator[Any]:
    count = request.sampling.num_images_per_prompt or 1
    size = (request.sampling.width or 8, request.sampling.height or 8)
    pictures = [Image.new("RGB", size, colour(seeds[index % len(seeds)] if seeds else 0)) for index in range(count)]
    output = generation_service_pb2.Output
    if request.output.output_type in ("", "pil"):
        for index, picture in enumerate(pictures):
            artifact = media.pack_image(picture, request.output.media_type or "image/png")
            yield output(field="images", index=index, artifact=values.artifact_to_proto(artifact))
        return
    array = np.stack([np.asarray(picture, dtype=np.float32) / 255 for picture in pictures])
    artifact = values.Artifact(values.NDARRAY, array.tobytes(), "float32", array.shape)
    if request.output.output_type in ("pt", "latent"):
        array = array.transpose(0, 3, 1, 2)
        artifact = values.Artifact(values.TENSOR, array.tobytes(), "float32", array.shape)
    yield output(field="images", index=0, artifact=values.artifact_to_proto(artifact))


def _advance(generator: Any) -> Any:
    import torch

    twin = torch.Generator(generator.device)
    twin.set_state(torch.frombuffer(bytearray(generator.state), dtype=torch.uint8))
    torch.rand(1, generator=twin)
    return generation_service_pb2.Generator(device=generator.device, state=twin.get_state().numpy().tobytes())

"""A connection to a daemon."""
# Generated from aio/client.py by client/unasync.py: edit that one.

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf import empty_pb2, field_mask_pb2

from . import component, quantization, spec, traces
from .channel import (
    MAX_MESSAGE_BYTES,
    SERVING,
    SHORT_CALL_SECONDS,
    Certificates,
    Stubs,
    call_metadata,
    channel_options,
    check_size,
    failure,
    resolve_target,
)
from .conversation import Conversation
from .errors import DenoisedError
from .generation_stream import GenerationStream
from .job import Job
from .load_stream import LoadStream
from .manifest import Manifest
from .patience import ANSWER_SECONDS
from .pipeline import Pipeline
from .plan import Plan
from .stream import Stream
from .units import Ttl, to_duration
from .v1 import generation_service_pb2, pipeline_service_pb2, worker_service_pb2


class Client:
    """Talks to one daemon. Connects with its first call; use it with `with`, or close it.

    Every failure is a DenoisedError; `denoised.errors` has the tree.

    Attributes:
        target: Where the daemon is.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        token: str | None = None,
        ca: str | os.PathLike[str] | None = None,
        client_cert: str | os.PathLike[str] | None = None,
        client_key: str | os.PathLike[str] | None = None,
        server_name: str | None = None,
        timeout: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        progress_bar: bool = True,
    ) -> None:
        """Prepares a connection.

        Args:
            target: "host:port", or any other gRPC target. Defaults to the environment's DENOISED_TARGET, else
                "127.0.0.1:50051".
            token: Sent with every call as a bearer token. Defaults to the environment's DENOISED_TOKEN, else none.
            ca: For a daemon that speaks TLS: the PEM file of the authority that signed its certificate, or "system" for
                the usual ones. Defaults to the environment's DENOISED_CA, else plain text.
            client_cert: PEM file of the certificate to show, with its chain, where the daemon asks for one. Defaults
                to the environment's DENOISED_CLIENT_CERT, else none.
            client_key: PEM file of its key. Defaults to the environment's DENOISED_CLIENT_KEY, else none.
            server_name: The name that the daemon's certificate is for, where that is not the target's.
            timeout: Seconds that a call may take when it does not say so itself. By default loads and generations take
                as long as they need, and short calls at most a minute.
            credentials: In place of `ca`, `client_cert` and `client_key`: credentials of gRPC.
            max_message_bytes: Largest request that is sent and largest response that is taken, in bytes.
            progress_bar: Whether loads and generations show progress bars on stderr.

        Raises:
            InvalidFieldError: A file cannot be read, or a certificate comes without its key.
        """
        self.target = resolve_target(target)
        self.progress_bar = progress_bar
        self._timeout = timeout
        self._certificates = Certificates.of(ca, client_cert, client_key)
        self._credentials = credentials or self._certificates.credentials()
        self._server_name = server_name
        self._max_message_bytes = max_message_bytes
        self._metadata = call_metadata(token)
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._connected: Stubs | None = None
        self._is_closed = False
        self._devices: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.target}{', closed' if self._is_closed else ''}>"

    @property
    def is_closed(self) -> bool:
        """Whether it was closed."""
        return self._is_closed

    def close(self) -> None:
        """Ends the connection and every call on it. Pipelines stay in the daemon."""
        self._is_closed = True
        if self._channel is not None:
            self._channel.close()

    # Pipelines

    def load(
        self,
        repo_id: str | os.PathLike[str],
        *,
        task: str = "",
        dtype: Any = None,
        revision: str = "",
        variant: str = "",
        use_safetensors: bool | None = None,
        subfolder: str = "",
        quantization_config: Any = None,
        single_file: str = "",
        config: str | os.PathLike[str] | component.Component | None = None,
        overrides: Mapping[str, Any] | None = None,
        hub_token: str = "",
        local_files_only: bool = False,
        force_download: bool = False,
        ttl: Ttl | None = None,
        pipeline_id: str = "",
        request_id: str = "",
        shared: bool = False,
        pinned: bool = False,
        keep_alive: Ttl | None = None,
        timeout: float | None = None,
        on_progress: Callable[[pipeline_service_pb2.LoadProgress], object] | None = None,
    ) -> Pipeline:
        """Loads a pipeline and waits until it is ready to run. Leaving early abandons the load.

        Args:
            repo_id: Repository on the Hub, directory that the daemon may read, or embedded model such as "demo".
            task: "text-to-image", "image-to-image" or "inpainting". Defaults to the class that the checkpoint names.
            dtype: Element type of the weights: a torch.dtype or its name, "auto" for that of the files, or a dict by
                component with "default" for the others. Defaults to float32.
            revision: Branch, tag or commit. Defaults to "main".
            variant: Weight variant, such as "fp16".
            use_safetensors: True for safetensors files only, False for pickled files only, None for what is there.
            subfolder: Folder inside the repository that has the pipeline.
            quantization_config: How to quantise components: a PipelineQuantizationConfig of diffusers, a dict of its
                arguments, or a dict of configurations by component.
            single_file: A safetensors file inside the repository that has the weights of all components, in the layout
                of those who trained them.
            config: Repository or directory that describes what is in `single_file`, or a `Component` with its
                subfolder and revision. Defaults to the repository of the file.
            overrides: Components to leave out (None) or to take from elsewhere (a `Component`, or several in a list),
                and constructor options to set, by name.
            hub_token: Token of the Hugging Face Hub, for gated and private repositories. It is used for this load's
                downloads and not kept.
            local_files_only: Whether to use only what is in the daemon's cache.
            force_download: Whether to download again what is in the daemon's cache.
            ttl: How long the pipeline stays after its last use: seconds, a timedelta, or text such as "1h".
            pipeline_id: Id of the handle. Defaults to one that cannot be guessed.
            request_id: Makes sending the same load again safe, best a UUID.
            shared: Whether other clients may see and use it; only you may change and unload it.
            pinned: Whether it stays whatever its lease says, on the device too, and is built again by itself when its
                worker dies.
            keep_alive: How long its weights stay on the device after its last use when nobody else needs their room;
                they are back when it is used. Written as `ttl`. Defaults to without end.
            timeout: Seconds it may take.
            on_progress: Called with each `LoadProgress`.

        Raises:
            LoadError: The source does not exist, may not be read, or is not whole.
            TaskNotSupportedError: The checkpoint's family has no class for the task.
            ResourceError: The weights do not fit.
            PipelineExistsError: The id is taken by another pipeline.
        """
        request = pipeline_service_pb2.LoadPipelineRequest(
            spec=pipeline_service_pb2.PipelineSpec(
                repo_id=spec.source(repo_id),
                revision=revision,
                variant=variant,
                task=spec.task_number(task),
                use_safetensors=use_safetensors,
                subfolder=subfolder,
                overrides=component.overrides(overrides or {}),
                quantization_config=quantization.fields(quantization_config),
                single_file=single_file,
                config_source=None if config is None else component.config_source(config),
                **spec.dtype_fields(dtype),
            ),
            ttl=None if ttl is None else to_duration(ttl),
            pipeline_id=pipeline_id,
            request_id=request_id,
            shared=shared,
            pinned=pinned,
            keep_alive=None if keep_alive is None else to_duration(keep_alive, "keep_alive"),
            hub_token=hub_token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return self._load(request, timeout, on_progress)

    def plan(
        self,
        repo_id: str | os.PathLike[str],
        *,
        task: str = "",
        dtype: Any = None,
        revision: str = "",
        variant: str = "",
        use_safetensors: bool | None = None,
        subfolder: str = "",
        quantization_config: Any = None,
        single_file: str = "",
        config: str | os.PathLike[str] | component.Component | None = None,
        overrides: Mapping[str, Any] | None = None,
        hub_token: str = "",
        local_files_only: bool = False,
        timeout: float | None = None,
    ) -> Plan:
        """Says what loading a pipeline would take and whether there is room for it. Loads nothing.

        Args:
            repo_id: As for `load`.
            task: As for `load`.
            dtype: As for `load`.
            revision: As for `load`.
            variant: As for `load`.
            use_safetensors: As for `load`.
            subfolder: As for `load`.
            quantization_config: As for `load`.
            single_file: As for `load`.
            config: As for `load`.
            overrides: As for `load`.
            hub_token: As for `load`.
            local_files_only: As for `load`.
            timeout: Seconds it may take.

        Raises:
            LoadError: The source does not exist, may not be read, or is not whole.
            TaskNotSupportedError: The checkpoint's family has no class for the task.
        """
        request = pipeline_service_pb2.PlanPipelineRequest(
            spec=pipeline_service_pb2.PipelineSpec(
                repo_id=spec.source(repo_id),
                revision=revision,
                variant=variant,
                task=spec.task_number(task),
                use_safetensors=use_safetensors,
                subfolder=subfolder,
                overrides=component.overrides(overrides or {}),
                quantization_config=quantization.fields(quantization_config),
                single_file=single_file,
                config_source=None if config is None else component.config_source(config),
                **spec.dtype_fields(dtype),
            ),
            hub_token=hub_token,
            local_files_only=local_files_only,
        )
        response: pipeline_service_pb2.PlanPipelineResponse = self._call(
            lambda stubs: stubs.pipelines.PlanPipeline, request, timeout
        )
        return Plan.of(response)

    def derive(
        self,
        source: Pipeline | str,
        task: str,
        *,
        overrides: Mapping[str, Any] | None = None,
        hub_token: str = "",
        local_files_only: bool = False,
        force_download: bool = False,
        ttl: Ttl | None = None,
        pipeline_id: str = "",
        request_id: str = "",
        shared: bool = False,
        pinned: bool = False,
        keep_alive: Ttl | None = None,
        timeout: float | None = None,
    ) -> Pipeline:
        """Makes a pipeline for another task from the components of a live one. Takes milliseconds and no memory.

        Args:
            source: A pipeline or its name.
            task: "text-to-image", "image-to-image" or "inpainting".
            overrides: As for `load`.
            hub_token: As for `load`, for components that are given.
            local_files_only: As for `load`.
            force_download: As for `load`.
            ttl: As for `load`.
            pipeline_id: As for `load`.
            request_id: As for `load`.
            shared: As for `load`; the source's own sharing is not inherited.
            pinned: As for `load`, and not inherited.
            keep_alive: As for `load`, and not inherited.
            timeout: Seconds it may take.

        Raises:
            PipelineNotFoundError: There is no such pipeline.
            TaskNotSupportedError: The source's family has no class for the task, or its weights do not fit it.
        """
        request = pipeline_service_pb2.DerivePipelineRequest(
            source=spec.full_name(source if isinstance(source, str) else source.name),
            derivation=pipeline_service_pb2.Derivation(
                task=spec.task_number(task), overrides=component.overrides(overrides or {})
            ),
            ttl=None if ttl is None else to_duration(ttl),
            pipeline_id=pipeline_id,
            request_id=request_id,
            shared=shared,
            pinned=pinned,
            keep_alive=None if keep_alive is None else to_duration(keep_alive, "keep_alive"),
            hub_token=hub_token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        response: pipeline_service_pb2.DerivePipelineResponse = self._call(
            lambda stubs: stubs.pipelines.DerivePipeline, request, timeout
        )
        return self._pipeline(response.pipeline)

    def restore(self, manifest: Manifest, *, timeout: float | None = None) -> Pipeline:
        """A pipeline as it was when it made something: loaded, derived, and with the same settings and adapters.

        Args:
            manifest: What `result.manifest` or the picture says.
            timeout: Seconds that each step may take.

        Raises:
            LoadError: The weights are not there any more.
        """
        message = manifest.message
        pipe = self._load(pipeline_service_pb2.LoadPipelineRequest(spec=message.spec), timeout)
        for step in message.derivations:
            request = pipeline_service_pb2.DerivePipelineRequest(source=pipe.name, derivation=step)
            response: pipeline_service_pb2.DerivePipelineResponse = self._call(
                lambda stubs: stubs.pipelines.DerivePipeline, request, timeout
            )
            pipe.unload()
            pipe = self._pipeline(response.pipeline)
        names = [field.name for field, _ in message.settings.ListFields()]
        if names:
            pipe = self._pipeline(self.update(pipe.name, message.settings, names))
        return pipe

    def pipeline(self, name: str) -> Pipeline:
        """The live pipeline of that name, "pipelines/{id}" or the id alone.

        Raises:
            PipelineNotFoundError: There is none, or it expired.
        """
        return self._pipeline(self.get_info(name))

    def pipelines(self) -> list[Pipeline]:
        """All live pipelines, oldest first."""
        found: list[Pipeline] = []
        request = pipeline_service_pb2.ListPipelinesRequest(page_size=500)
        while True:
            page: pipeline_service_pb2.ListPipelinesResponse = self._ask(
                lambda stubs: stubs.pipelines.ListPipelines, request
            )
            found.extend([self._pipeline(info) for info in page.pipelines])
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def get_info(self, name: str) -> pipeline_service_pb2.Pipeline:
        """What the daemon says about a pipeline. Raises as `pipeline` does."""
        request = pipeline_service_pb2.GetPipelineRequest(name=spec.full_name(name))
        response: pipeline_service_pb2.GetPipelineResponse = self._ask(
            lambda stubs: stubs.pipelines.GetPipeline, request
        )
        return response.pipeline

    def update(
        self, name: str, settings: pipeline_service_pb2.PipelineSettings, names: Sequence[str]
    ) -> pipeline_service_pb2.Pipeline:
        """Changes settings of a pipeline, one level below the pipeline's own methods.

        Args:
            name: "pipelines/{id}" or the id alone.
            settings: The new ones.
            names: Which of them to change: "noise_scheduler", "adapters".

        Raises:
            PipelineNotFoundError: There is none, or it expired.
        """
        request = pipeline_service_pb2.UpdatePipelineRequest(
            name=spec.full_name(name), settings=settings, update_mask=field_mask_pb2.FieldMask(paths=names)
        )
        response: pipeline_service_pb2.UpdatePipelineResponse = self._call(
            lambda stubs: stubs.pipelines.UpdatePipeline, request, None
        )
        return response.pipeline

    def renew(
        self, name: str, ttl: Ttl | None = None, *, pinned: bool | None = None, keep_alive: Ttl | None = None
    ) -> pipeline_service_pb2.Pipeline:
        """Sets the lease of a pipeline anew.

        Args:
            name: "pipelines/{id}" or the id alone.
            ttl: How long it stays after its last use, from now on. Defaults to what it was.
            pinned: Whether it never expires and never leaves the device. Defaults to what it was.
            keep_alive: How long its weights stay on the device after its last use; -1 without end. Defaults to what it
                was.

        Raises:
            PipelineNotFoundError: There is none, or it expired.
        """
        request = pipeline_service_pb2.RenewPipelineRequest(
            name=spec.full_name(name),
            ttl=None if ttl is None else to_duration(ttl),
            pinned=pinned,
            keep_alive=None if keep_alive is None else to_duration(keep_alive, "keep_alive"),
        )
        response: pipeline_service_pb2.RenewPipelineResponse = self._ask(
            lambda stubs: stubs.pipelines.RenewPipeline, request
        )
        return response.pipeline

    def unload(self, name: str, *, force: bool = False, timeout: float | None = None) -> int:
        """Lets go of a pipeline and returns the bytes of weights that were freed.

        Args:
            name: "pipelines/{id}" or the id alone.
            force: Whether to stop its generations instead of waiting for them.
            timeout: Seconds it may take.

        Raises:
            PipelineNotFoundError: There never was such a pipeline. Unloading one again succeeds.
        """
        request = pipeline_service_pb2.UnloadPipelineRequest(name=spec.full_name(name), force=force)
        response: pipeline_service_pb2.UnloadPipelineResponse = self._call(
            lambda stubs: stubs.pipelines.UnloadPipeline, request, timeout
        )
        return response.freed_bytes

    def watch(self) -> Stream[pipeline_service_pb2.WatchPipelinesResponse]:
        """What changes: every pipeline there is, then a SYNCED event, then each change as it happens.

        Iterating raises WatchLaggedError when it is too slow to follow; watch again then.
        """
        return self._stream(
            lambda stubs: stubs.pipelines.WatchPipelines, pipeline_service_pb2.WatchPipelinesRequest(), None
        )

    # Generations

    def generate(
        self, request: generation_service_pb2.GenerateRequest, *, timeout: float | None = None
    ) -> GenerationStream:
        """Runs a pipeline, one level below `pipe(...)`: every event as the daemon sends it, over lost connections.

        Leaving the iteration stops the generation at its next step, unless the request is detached.

        Args:
            request: What to run.
            timeout: Seconds it may take, waiting included.

        Raises:
            MessageTooLargeError: The request exceeds the client's `max_message_bytes`.
        """
        own = generation_service_pb2.GenerateRequest()
        own.CopyFrom(request)
        return GenerationStream(self._stream, own, timeout=self._limit(timeout))

    def resume(self, name: str, *, timeout: float | None = None) -> GenerationStream:
        """The events of a generation from its start, as `generate` would have given them.

        Args:
            name: "generations/{id}" or the id alone.
            timeout: Seconds to follow it.

        Iterating raises GenerationNotFoundError when there is none, or its result is not kept any more.
        """
        return GenerationStream(
            self._stream, None, name=spec.full_name(name, "generations/"), timeout=self._limit(timeout)
        )

    def generation(self, name: str) -> Job:
        """The generation of that name, "generations/{id}" or the id alone.

        Raises:
            GenerationNotFoundError: There is none, or its result is not kept any more.
        """
        return Job(self, self.get_generation(name))

    def generations(self) -> list[Job]:
        """Those that wait or run, and the detached ones whose results are kept, oldest first."""
        found: list[Job] = []
        request = generation_service_pb2.ListGenerationsRequest(page_size=500)
        while True:
            page: generation_service_pb2.ListGenerationsResponse = self._ask(
                lambda stubs: stubs.generations.ListGenerations, request
            )
            found.extend([Job(self, info) for info in page.generations])
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def get_generation(self, name: str) -> generation_service_pb2.Generation:
        """What the daemon says about a generation. Raises as `generation` does."""
        request = generation_service_pb2.GetGenerationRequest(name=spec.full_name(name, "generations/"))
        response: generation_service_pb2.GetGenerationResponse = self._ask(
            lambda stubs: stubs.generations.GetGeneration, request
        )
        return response.generation

    def cancel_generation(self, name: str) -> generation_service_pb2.Generation:
        """Ends a generation at its next step; one that is over stays as it is. Raises as `generation` does."""
        request = generation_service_pb2.CancelGenerationRequest(name=spec.full_name(name, "generations/"))
        response: generation_service_pb2.CancelGenerationResponse = self._ask(
            lambda stubs: stubs.generations.CancelGeneration, request
        )
        return response.generation

    def converse(
        self, start: generation_service_pb2.GenerateInteractivelyRequest, *, timeout: float | None = None
    ) -> Conversation[generation_service_pb2.GenerateInteractivelyResponse]:
        """Runs a pipeline with callbacks, one level below `pipe(...)`: each `step_end` takes a reply.

        Leaving the iteration stops the generation.

        Args:
            start: What to run, and which callbacks to ask.
            timeout: Seconds it may take, waiting and callbacks included.

        Raises:
            MessageTooLargeError: The request exceeds the client's `max_message_bytes`.
        """
        limit = self._limit(timeout)
        if limit is not None and not start.start.request.HasField("timeout"):
            own = generation_service_pb2.GenerateInteractivelyRequest()
            own.CopyFrom(start)
            own.start.request.timeout.CopyFrom(to_duration(limit))
            start, limit = own, limit + ANSWER_SECONDS
        check_size(start, self._max_message_bytes)
        conversation: Conversation[generation_service_pb2.GenerateInteractivelyResponse] = Conversation(
            lambda sent, headers: self._stubs().generations.GenerateInteractively(
                sent, timeout=limit, metadata=(*self._metadata, *headers)
            ),
            "GenerateInteractively",
            self.target,
        )
        conversation.send(start)
        return conversation

    def encode_prompt(
        self, request: generation_service_pb2.EncodePromptRequest, *, timeout: float | None = None
    ) -> generation_service_pb2.EncodePromptResponse:
        """Runs a pipeline's `encode_prompt`, one level below the pipeline's own method.

        Args:
            request: What to encode.
            timeout: Seconds it may take, waiting included.
        """
        response: generation_service_pb2.EncodePromptResponse = self._call(
            lambda stubs: stubs.generations.EncodePrompt, request, timeout
        )
        return response

    # Workers

    def workers(self) -> list[worker_service_pb2.Worker]:
        """The processes that own the devices, with their memory and what they do."""
        found: list[worker_service_pb2.Worker] = []
        request = worker_service_pb2.ListWorkersRequest(page_size=500)
        while True:
            page: worker_service_pb2.ListWorkersResponse = self._ask(lambda stubs: stubs.workers.ListWorkers, request)
            found.extend(page.workers)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def drain_worker(self, name: str, *, timeout: float | None = None) -> worker_service_pb2.Worker:
        """Makes a worker take no more work, and waits until it has nothing left to do. Needs an admin's token.

        What runs there ends well; its pipelines are built again elsewhere at their next use.

        Args:
            name: "workers/{id}".
            timeout: Seconds to wait at most; the worker is drained all the same.

        Raises:
            WorkerNotFoundError: There is no such worker.
        """
        response: worker_service_pb2.DrainWorkerResponse = self._call(
            lambda stubs: stubs.workers.DrainWorker, worker_service_pb2.DrainWorkerRequest(name=name), timeout
        )
        return response.worker

    def resume_worker(self, name: str) -> worker_service_pb2.Worker:
        """Makes a worker that was drained take work again. Needs an admin's token."""
        response: worker_service_pb2.ResumeWorkerResponse = self._ask(
            lambda stubs: stubs.workers.ResumeWorker, worker_service_pb2.ResumeWorkerRequest(name=name)
        )
        return response.worker

    def watch_workers(self, interval: Ttl = 1.0) -> Stream[worker_service_pb2.WatchWorkersResponse]:
        """The workers, and then each as it changes.

        Args:
            interval: Shortest time between two messages about the same worker: seconds, a timedelta or text.
        """
        request = worker_service_pb2.WatchWorkersRequest(interval=to_duration(interval, "interval"))
        return self._stream(lambda stubs: stubs.workers.WatchWorkers, request, None)

    def server_info(self) -> worker_service_pb2.GetServerInfoResponse:
        """What the daemon is and what it accepts."""
        response: worker_service_pb2.GetServerInfoResponse = self._ask(
            lambda stubs: stubs.workers.GetServerInfo, worker_service_pb2.GetServerInfoRequest()
        )
        return response

    def is_serving(self, *, timeout: float | None = None) -> bool:
        """Whether the daemon takes work: what its `grpc.health.v1` says, which needs no token.

        Args:
            timeout: Seconds it may take.

        Raises:
            DaemonUnreachableError: Nobody answers.
        """
        status: bytes = self._call(
            lambda stubs: stubs.health, empty_pb2.Empty(), timeout or self._limit(None) or SHORT_CALL_SECONDS
        )
        return status == SERVING

    # Calls

    def _load(
        self,
        request: pipeline_service_pb2.LoadPipelineRequest,
        timeout: float | None,
        on_progress: Callable[[pipeline_service_pb2.LoadProgress], object] | None = None,
    ) -> Pipeline:
        info: pipeline_service_pb2.Pipeline | None = None
        with contextlib.closing(iter(LoadStream(self._stream, request, self._limit(timeout)))) as events:
            for event in events:
                if event.HasField("pipeline"):
                    info = event.pipeline
                elif on_progress is not None:
                    on_progress(event.progress)
        if info is None:
            raise DenoisedError("The daemon ended the load without a pipeline.")
        return self._pipeline(info)

    def _pipeline(self, info: pipeline_service_pb2.Pipeline) -> Pipeline:
        if info.worker and info.worker not in self._devices:
            # A worker keeps its name and its device for as long as the daemon runs.
            with contextlib.suppress(DenoisedError):
                self._devices |= {worker.name: worker.device for worker in self.workers()}
        return Pipeline(self, info, self._devices.get(info.worker, ""))

    def _stubs(self) -> Stubs:
        with self._lock:
            if self._is_closed:
                raise DenoisedError("This client is closed.", hint="Make a new one.")
            if self._connected is None:
                options = channel_options(self._max_message_bytes, self._server_name)
                if self._credentials is None:
                    self._channel = grpc.insecure_channel(self.target, options=options)
                else:
                    self._channel = grpc.secure_channel(self.target, self._credentials, options=options)
                self._connected = Stubs.of(self._channel)
            return self._connected

    def _ask(self, choose: Callable[[Stubs], Any], request: Any) -> Any:
        return self._call(choose, request, self._limit(None) or SHORT_CALL_SECONDS)

    def _limit(self, timeout: float | None) -> float | None:
        return self._timeout if timeout is None else timeout

    def _call(self, choose: Callable[[Stubs], Any], request: Any, timeout: float | None) -> Any:
        check_size(request, self._max_message_bytes)
        method = choose(self._stubs())
        with traces.calling(_method(request)) as headers:
            try:
                return method(request, timeout=self._limit(timeout), metadata=(*self._metadata, *headers))
            except grpc.RpcError as error:
                raise failure(error, self.target) from None

    def _stream(self, choose: Callable[[Stubs], Any], request: Any, timeout: float | None) -> Stream[Any]:
        check_size(request, self._max_message_bytes)
        return Stream(
            lambda headers: choose(self._stubs())(request, timeout=timeout, metadata=(*self._metadata, *headers)),
            _method(request),
            self.target,
        )


def _method(request: Any) -> str:
    return type(request).__name__.removesuffix("Request")


_defaults: weakref.WeakKeyDictionary[object, dict[tuple[object, ...], Client]] = weakref.WeakKeyDictionary()
_defaults_lock = threading.Lock()


def default_client() -> Client:
    """The client that calls share when they name none: one for each that the environment describes."""
    client = Client()
    # A process made by fork() must not use its parent's connections.
    key = (os.getpid(), client.target, client._metadata, client._certificates)
    with _defaults_lock:
        # The main thread stands for the whole process.
        clients = _defaults.setdefault(threading.main_thread(), {})
        if key not in clients or clients[key].is_closed:
            clients[key] = client
        return clients[key]

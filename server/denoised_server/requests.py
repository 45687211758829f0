"""Requests as plain values. What a proto can say and we cannot take is refused here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sized
from dataclasses import fields, replace

from denoised.errors import InvalidFieldError
from denoised.units import from_duration
from denoised.v1 import (
    adapter_pb2,
    artifact_pb2,
    generation_service_pb2,
    pipeline_service_pb2,
    worker_service_pb2,
)
from denoised.values import Artifact, Plain, artifact_from_proto, from_proto

from . import adapter_calls, overrides, quantization
from .arguments import SHOWN_NAME, merge
from .generation import Terms
from .messages import (
    Access,
    Adapter,
    AdapterCall,
    AdapterSource,
    Callback,
    ComponentSource,
    Derivation,
    Generate,
    NoiseScheduler,
    PipelineSettings,
    PreviewOptions,
    Reply,
    Spec,
)
from .pool import Lease
from .updates import Change

# Of values in values: no argument of diffusers comes near, and what walks through them has to end.
MAX_DEPTH = 8
MAX_ITEMS = 10_000
MAX_ADAPTERS = 32
WATCH_SECONDS = 1.0
PREVIEW_SIZE, PREVIEW_SIZES = 256, (16, 1024)
STEP_INTERVALS = (1, 1000)
TASKS: Mapping[int, str] = {
    pipeline_service_pb2.TASK_UNSPECIFIED: "",
    pipeline_service_pb2.TASK_TEXT_TO_IMAGE: "text-to-image",
    pipeline_service_pb2.TASK_IMAGE_TO_IMAGE: "image-to-image",
    pipeline_service_pb2.TASK_INPAINTING: "inpainting",
    pipeline_service_pb2.TASK_TEXT_TO_AUDIO: "text-to-audio",
    pipeline_service_pb2.TASK_TEXT_TO_VIDEO: "text-to-video",
    pipeline_service_pb2.TASK_IMAGE_TO_VIDEO: "image-to-video",
    pipeline_service_pb2.TASK_VIDEO_TO_VIDEO: "video-to-video",
}


def lease(
    request: pipeline_service_pb2.LoadPipelineRequest | pipeline_service_pb2.DerivePipelineRequest,
) -> Lease:
    return Lease(
        ttl(request), request.pipeline_id, request.request_id, request.pinned, request.shared, keep_alive(request)
    )


def pinned(request: pipeline_service_pb2.RenewPipelineRequest) -> bool | None:
    return request.pinned if request.HasField("pinned") else None


def keep_alive(
    request: pipeline_service_pb2.LoadPipelineRequest
    | pipeline_service_pb2.DerivePipelineRequest
    | pipeline_service_pb2.RenewPipelineRequest,
) -> float | None:
    return from_duration(request.keep_alive) if request.HasField("keep_alive") else None


def ttl(
    request: pipeline_service_pb2.LoadPipelineRequest
    | pipeline_service_pb2.DerivePipelineRequest
    | pipeline_service_pb2.RenewPipelineRequest,
) -> float | None:
    return from_duration(request.ttl) if request.HasField("ttl") else None


def spec(request: pipeline_service_pb2.LoadPipelineRequest | pipeline_service_pb2.PlanPipelineRequest) -> Spec:
    message = request.spec
    return Spec(
        repo_id=_repo_id(message.repo_id, "spec.repo_id"),
        revision=overrides.text(message.revision, "spec.revision"),
        variant=overrides.text(message.variant, "spec.variant"),
        task=_task(message.task, "spec.task"),
        dtype="auto" if message.auto_dtype else overrides.dtype(message.dtype, "spec.dtype", "float32"),
        use_safetensors=message.use_safetensors if message.HasField("use_safetensors") else None,
        overrides=overrides.parse(message.overrides, "spec.overrides"),
        subfolder=overrides.text(message.subfolder, "spec.subfolder"),
        component_dtypes={
            overrides.text(role, "spec.component_dtypes"): overrides.dtype(
                number, f"spec.component_dtypes[{role[:80]}]", "float32"
            )
            for role, number in message.component_dtypes.items()
        },
        quantization_config=quantization.check(
            {
                name: _value(value, f"spec.quantization_config[{name[:SHOWN_NAME]}]")
                for name, value in message.quantization_config.items()
            },
            "spec.quantization_config",
        ),
        single_file=_single_file(message),
        config_source=_config_source(message),
    )


def _single_file(message: pipeline_service_pb2.PipelineSpec) -> str:
    name = overrides.text(message.single_file, "spec.single_file")
    if name and not name.endswith(".safetensors"):
        raise InvalidFieldError.of(
            "spec.single_file", f"{name[:100]!r} is no safetensors file.", hint="Convert it to safetensors."
        )
    if name and message.quantization_config:
        raise InvalidFieldError.of(
            "spec.quantization_config",
            "what is in a single file is not quantised.",
            hint="Save it as a pipeline first.",
        )
    return name


def _config_source(message: pipeline_service_pb2.PipelineSpec) -> ComponentSource | None:
    if not message.HasField("config_source"):
        return None
    if not message.single_file:
        raise InvalidFieldError.of(
            "spec.config_source", "there is no single_file that it describes.", hint="Leave it out, or name the file."
        )
    source = overrides.component_source(message.config_source, "spec.config_source")
    if source != ComponentSource(source.repo_id, source.subfolder, source.revision):
        raise InvalidFieldError.of(
            "spec.config_source",
            "it says more than where the configuration is.",
            hint="Set repo_id, subfolder and revision only.",
        )
    return source


def access(
    request: pipeline_service_pb2.LoadPipelineRequest | pipeline_service_pb2.DerivePipelineRequest,
) -> Access:
    return Access(_hub_token(request.hub_token), request.local_files_only, request.force_download)


def plan_access(request: pipeline_service_pb2.PlanPipelineRequest) -> Access:
    return Access(_hub_token(request.hub_token), request.local_files_only)


def _hub_token(text: str) -> str:
    token = overrides.text(text, "hub_token")
    if not token.isascii() or not token.isprintable():
        raise InvalidFieldError.of("hub_token", "it is no token.", hint="Tokens of the Hub begin with hf_.")
    return token


def watch_interval(request: worker_service_pb2.WatchWorkersRequest) -> float:
    if not request.HasField("interval"):
        return WATCH_SECONDS
    interval = from_duration(request.interval)
    if not 0.1 <= interval <= 3600:
        raise InvalidFieldError.of("interval", f"{interval:g} s is out of range.", hint="Ask for 0.1 s to one hour.")
    return interval


def derivation(request: pipeline_service_pb2.DerivePipelineRequest) -> Derivation:
    message = request.derivation
    task = _task(message.task, "derivation.task")
    if not task:
        raise InvalidFieldError.of("derivation.task", "it is not set.", hint="Say what to make of the pipeline.")
    return Derivation(task, overrides.parse(message.overrides, "derivation.overrides"))


def update(request: pipeline_service_pb2.UpdatePipelineRequest) -> Change:
    known = sorted(each.name for each in fields(PipelineSettings))
    paths = frozenset(request.update_mask.paths)
    if not paths:
        raise InvalidFieldError.of("update_mask", "it names nothing.", hint=f"Name some of {', '.join(known)}.")
    for path in paths:
        name, dot, _ = path.partition(".")
        if name not in known or (dot and name != "features"):
            raise InvalidFieldError.of(
                "update_mask", f"{path[:80]!r} cannot be updated.", hint=f"Name some of {', '.join(known)}."
            )
    settings = request.settings
    noise = None
    if settings.HasField("noise_scheduler"):
        noise = _noise_scheduler(settings.noise_scheduler, "settings.noise_scheduler")
    adapters = [_adapter_call(call, f"settings.adapters[{index}]") for index, call in enumerate(settings.adapters)]
    features = {
        name: {key: _value(value, f"settings.features[{name}]") for key, value in arguments.entries.items()}
        for name, arguments in settings.features.items()
    }
    return Change(paths, PipelineSettings(noise, adapter_calls.compact(adapters), features))


def generate(request: generation_service_pb2.GenerateRequest, left: float | None = None) -> Generate:
    """`left` is what the deadline of the call leaves, in seconds."""
    typed: dict[str, Plain] = {}
    if request.HasField("prompt"):
        typed["prompt"] = request.prompt
    if request.HasField("negative_prompt"):
        typed["negative_prompt"] = request.negative_prompt
    if request.HasField("image"):
        typed["image"] = _artifact(request.image, "image")
    if request.HasField("mask_image"):
        typed["mask_image"] = _artifact(request.mask_image, "mask_image")
    sampling = request.sampling
    for field, value in sampling.ListFields():
        if field.name not in ("seeds", "generators"):
            typed[field.name] = value
    others = {name: _value(value, name) for name, value in request.arguments.items()}
    output = request.output
    return Generate(
        pipeline=request.pipeline,
        arguments=merge(typed, others),
        seeds=tuple(sampling.seeds),
        generators=tuple((generator.device, generator.state) for generator in sampling.generators),
        output_type=output.output_type,
        media_type=output.media_type or "image/png",
        quality=output.quality if output.HasField("quality") else 90,
        frames_per_second=output.frames_per_second if output.HasField("frames_per_second") else None,
        forbid_batching=_forbids(request.batching),
        priority=request.priority,
        progress_interval=from_duration(request.progress_interval),
        noise_scheduler=_noise_scheduler(request.noise_scheduler, "noise_scheduler")
        if request.HasField("noise_scheduler")
        else None,
        adapters=_adapters(request),
        timeout=_timeout(request, left),
        preview=_preview(request.preview) if request.HasField("preview") else None,
    )


def _preview(message: generation_service_pb2.PreviewOptions) -> PreviewOptions:
    size = message.size or PREVIEW_SIZE
    for name, value, bounds in (
        ("step_interval", message.step_interval, STEP_INTERVALS),
        ("size", size, PREVIEW_SIZES),
    ):
        low, high = bounds
        if not low <= value <= high:
            raise InvalidFieldError.of(f"preview.{name}", f"{value} is out of bounds.", hint=f"From {low} to {high:,}.")
    return PreviewOptions(message.step_interval, size)


def _timeout(request: generation_service_pb2.GenerateRequest, left: float | None) -> float | None:
    if request.on_disconnect == generation_service_pb2.ON_DISCONNECT_DETACH:
        # It goes on when the call is over.
        left = None
    if not request.HasField("timeout"):
        return left
    own = from_duration(request.timeout)
    if own <= 0:
        raise InvalidFieldError.of(
            "timeout", f"{own:g} s are not greater than zero.", hint="Leave it out for no limit."
        )
    return own if left is None else min(own, left)


def encode_prompt(request: generation_service_pb2.EncodePromptRequest, left: float | None = None) -> Generate:
    return Generate(
        pipeline=request.pipeline,
        arguments={name: _value(value, name) for name, value in request.arguments.items()},
        forbid_batching=_forbids(request.batching),
        priority=request.priority,
        method="encode_prompt",
        timeout=left,
    )


def start(
    message: generation_service_pb2.GenerateInteractivelyRequest | None, left: float | None
) -> tuple[Generate, Terms]:
    if message is None or not message.HasField("start"):
        raise InvalidFieldError.of("start", "it is not the first message.", hint="Send it first: it says what to run.")
    callbacks = {
        name: Callback(tuple(callback.tensor_inputs), max(callback.period, 1))
        for name, callback in message.start.callbacks.items()
    }
    if not callbacks:
        raise InvalidFieldError.of("start.callbacks", "it is empty.", hint="Name some, or use Generate.")
    request = message.start.request
    return replace(generate(request, left), callbacks=callbacks), terms(request)


async def replies(messages: AsyncIterator[generation_service_pb2.GenerateInteractivelyRequest]) -> AsyncIterator[Reply]:
    async for message in messages:
        if not message.HasField("reply"):
            raise InvalidFieldError.of("reply", "it is not set.", hint="Send nothing but replies after the start.")
        tensors = {name: _value(value, f"reply.tensors[{name}]") for name, value in message.reply.tensors.items()}
        state = {name: _value(value, f"reply.state[{name}]") for name, value in message.reply.state.items()}
        yield Reply("", tensors, state)


def terms(request: generation_service_pb2.GenerateRequest) -> Terms:
    if request.on_disconnect not in generation_service_pb2.OnDisconnect.values():
        raise InvalidFieldError.of(
            "on_disconnect", f"{request.on_disconnect} is not known.", hint="Send a value of the enum OnDisconnect."
        )
    detached = request.on_disconnect == generation_service_pb2.ON_DISCONNECT_DETACH
    return Terms(request.request_id, detached)


def _noise_scheduler(message: artifact_pb2.NoiseScheduler, field: str) -> NoiseScheduler:
    config = message.config.entries if message.HasField("config") else None
    return NoiseScheduler(
        overrides.text(message.class_name, f"{field}.class_name"),
        None if config is None else {name: _value(value, f"{field}.config[{name}]") for name, value in config.items()},
        {name: _value(value, f"{field}.overrides[{name}]") for name, value in message.overrides.items()},
    )


def _adapters(request: generation_service_pb2.GenerateRequest) -> tuple[Adapter, ...] | None:
    if not request.HasField("adapters"):
        return None
    chosen = request.adapters.adapters
    if len(chosen) > MAX_ADAPTERS:
        raise InvalidFieldError.of(
            "adapters", f"there are {len(chosen):,}.", hint=f"Send at most {MAX_ADAPTERS}, or fuse some."
        )
    return tuple(_adapter(message, f"adapters[{index}]") for index, message in enumerate(chosen))


def _adapter(message: adapter_pb2.Adapter, field: str) -> Adapter:
    scale: Plain = 1.0
    if message.HasField("scale"):
        scale = _value(message.scale, f"{field}.scale")
        adapter_calls.scale(scale, f"{field}.scale")
    match message.WhichOneof("kind"):
        case "name":
            return Adapter(overrides.text(message.name, f"{field}.name"), scale=scale)
        case "source":
            return Adapter(source=_adapter_source(message.source, f"{field}.source"), scale=scale)
    raise InvalidFieldError.of(field, "it is empty.", hint="Set a name or a source.")


def _adapter_source(message: adapter_pb2.AdapterSource, field: str) -> AdapterSource:
    return AdapterSource(
        _repo_id(message.repo_id, f"{field}.repo_id"),
        overrides.text(message.weight_name, f"{field}.weight_name"),
        overrides.text(message.subfolder, f"{field}.subfolder"),
        overrides.text(message.revision, f"{field}.revision"),
    )


def _adapter_call(message: adapter_pb2.AdapterCall, field: str) -> AdapterCall:
    call = AdapterCall(
        message.method,
        tuple(_adapter_source(source, f"{field}.sources[{index}]") for index, source in enumerate(message.sources)),
        {name: _value(value, f"{field}.arguments[{name[:64]}]") for name, value in message.arguments.items()},
    )
    adapter_calls.check(call, field)
    return call


def _forbids(batching: int) -> bool:
    if batching not in generation_service_pb2.Batching.values():
        raise InvalidFieldError.of("batching", f"{batching} is not known.", hint="Send a value of the enum Batching.")
    return batching == generation_service_pb2.BATCHING_FORBID


def _repo_id(repo_id: str, field: str) -> str:
    if not repo_id:
        raise InvalidFieldError.of(field, "it is empty.", hint="Name a repository, a directory or an embedded model.")
    return overrides.text(repo_id, field)


def _task(task: int, field: str) -> str:
    if task not in TASKS:
        raise InvalidFieldError.of(
            field, f"{task} is not a task that this daemon knows.", hint="Send a value of the enum Task."
        )
    return TASKS[task]


def _artifact(message: artifact_pb2.Artifact, field: str) -> Artifact:
    if message.WhichOneof("content") is None:
        raise InvalidFieldError.of(field, "its content is not set.", hint="Set `data`.")
    if not message.media_type:
        raise InvalidFieldError.of(field, "its media_type is not set.", hint='For example "image/png".')
    return artifact_from_proto(message)


def _value(message: artifact_pb2.Value, field: str, depth: int = 0) -> Plain:
    if depth > MAX_DEPTH:
        raise InvalidFieldError.of(
            field.partition("[")[0], "its lists and maps are too deep.", hint=f"Nest at most {MAX_DEPTH} of them."
        )
    match message.WhichOneof("kind"):
        case None:
            raise InvalidFieldError.of(
                field, "its value is not set.", hint="Leave it out, or send null_value for None."
            )
        case "artifact_value":
            return _artifact(message.artifact_value, field)
        case "list_value":
            _check_count(message.list_value.values, field)
            return [_value(item, field, depth + 1) for item in message.list_value.values]
        case "map_value":
            entries = message.map_value.entries
            _check_count(entries, field)
            return {key: _value(item, f"{field}[{key[:SHOWN_NAME]}]", depth + 1) for key, item in entries.items()}
    return from_proto(message)


def _check_count(items: Sized, field: str) -> None:
    if len(items) > MAX_ITEMS:
        raise InvalidFieldError.of(
            field, f"it has {len(items):,} elements.", hint=f"Send at most {MAX_ITEMS:,}, or an array."
        )

"""Plain values as responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from weakref import WeakKeyDictionary

from denoised.errors import InternalError
from denoised.v1 import adapter_pb2, artifact_pb2, generation_service_pb2, pipeline_service_pb2, worker_service_pb2
from denoised.values import DTYPES, Artifact, Plain, artifact_to_proto, to_proto
from denoised.version import __version__
from google.protobuf import duration_pb2, timestamp_pb2

from . import callers, overrides
from .eventlog import Numbered
from .generation import GenerationEvent, GenerationView, Making, Queued, Started, Summary
from .generation import State as GenerationState
from .handles import State
from .messages import (
    Adapter,
    AdapterCall,
    AdapterSource,
    Component,
    Derivation,
    Finished,
    Loaded,
    LoadedAdapter,
    LoadProgress,
    NoiseScheduler,
    Outcome,
    Output,
    Parameter,
    PhaseBegan,
    PipelineSettings,
    Preview,
    Progress,
    Snapshot,
    Spec,
    StepEnd,
)
from .probes import Health
from .requests import TASKS
from .supervision import WorkerState
from .views import ComponentView, PipelineView, PlanView, WorkerView
from .watchers import Change, ChangeKind

TASK_NUMBERS = {name: pipeline_service_pb2.Task.ValueType(number) for number, name in TASKS.items()}
RESIDENCIES = {
    "device": pipeline_service_pb2.RESIDENCY_DEVICE,
    "host": pipeline_service_pb2.RESIDENCY_HOST,
    "disk": pipeline_service_pb2.RESIDENCY_DISK,
}
STATES = {
    State.LOADING: pipeline_service_pb2.Pipeline.STATE_LOADING,
    State.ACTIVE: pipeline_service_pb2.Pipeline.STATE_ACTIVE,
    State.UNLOADING: pipeline_service_pb2.Pipeline.STATE_UNLOADING,
}
OUTCOMES = {
    Outcome.FITS: pipeline_service_pb2.PlanPipelineResponse.OUTCOME_FITS,
    Outcome.EVICTS: pipeline_service_pb2.PlanPipelineResponse.OUTCOME_EVICTS,
    Outcome.TAKES_TURNS: pipeline_service_pb2.PlanPipelineResponse.OUTCOME_TAKES_TURNS,
    Outcome.NO_ROOM: pipeline_service_pb2.PlanPipelineResponse.OUTCOME_NO_ROOM,
    Outcome.NEVER_FITS: pipeline_service_pb2.PlanPipelineResponse.OUTCOME_NEVER_FITS,
}
CHANGES = {
    ChangeKind.ADDED: pipeline_service_pb2.WatchPipelinesResponse.CHANGE_ADDED,
    ChangeKind.MODIFIED: pipeline_service_pb2.WatchPipelinesResponse.CHANGE_MODIFIED,
    ChangeKind.REMOVED: pipeline_service_pb2.WatchPipelinesResponse.CHANGE_REMOVED,
    ChangeKind.SYNCED: pipeline_service_pb2.WatchPipelinesResponse.CHANGE_SYNCED,
}
HEALTHS = {health: worker_service_pb2.Health.Value(f"HEALTH_{health.name}") for health in Health}
WORKER_STATES = {
    WorkerState.STARTING: worker_service_pb2.Worker.STATE_STARTING,
    WorkerState.ACTIVE: worker_service_pb2.Worker.STATE_ACTIVE,
    WorkerState.DRAINING: worker_service_pb2.Worker.STATE_DRAINING,
    WorkerState.LOST: worker_service_pb2.Worker.STATE_LOST,
    WorkerState.FAILED: worker_service_pb2.Worker.STATE_FAILED,
}


GENERATION_STATES = {
    GenerationState.WAITING: generation_service_pb2.Generation.STATE_WAITING,
    GenerationState.RUNNING: generation_service_pb2.Generation.STATE_RUNNING,
    GenerationState.SUCCEEDED: generation_service_pb2.Generation.STATE_SUCCEEDED,
    GenerationState.FAILED: generation_service_pb2.Generation.STATE_FAILED,
    GenerationState.CANCELLED: generation_service_pb2.Generation.STATE_CANCELLED,
}


def pipeline(view: PipelineView) -> pipeline_service_pb2.Pipeline:
    loaded = view.loaded
    return pipeline_service_pb2.Pipeline(
        name=view.name,
        spec=_spec(view.recipe.spec),
        derivations=[_derivation(step) for step in view.recipe.derivations],
        source=view.source,
        state=STATES[view.state],
        worker=view.worker,
        task=TASK_NUMBERS.get(loaded.task if loaded else "", pipeline_service_pb2.TASK_UNSPECIFIED),
        pipeline_class=loaded.pipeline_class if loaded else "",
        components=[_component(part) for part in view.components],
        parameters=[_parameter(parameter) for parameter in loaded.parameters] if loaded else (),
        exclusive_bytes=view.exclusive_bytes,
        shared_bytes=view.shared_bytes,
        residency=RESIDENCIES[view.residency],
        device_bytes=view.bytes_by_tier["device"],
        host_bytes=view.bytes_by_tier["host"],
        disk_bytes=view.bytes_by_tier["disk"],
        generation_count=view.generation_count,
        create_time=timestamp(view.create_time),
        last_use_time=timestamp(view.last_use_time),
        expire_time=timestamp(view.expire_time),
        owner=view.owner if callers.current().owns(view.owner) else "",
        shared=view.shared,
        settings=_settings(view.recipe.settings),
        adapters=[_loaded_adapter(adapter) for adapter in loaded.adapters] if loaded else (),
        noise_scheduler=_noise_scheduler(loaded.noise_scheduler if loaded else None),
        configuration=_configuration(loaded) if loaded else None,
        encode_prompt_parameters=[_parameter(each) for each in loaded.encode_parameters] if loaded else (),
        callback_tensor_inputs=loaded.callback_tensor_inputs if loaded else (),
        pinned=view.pinned,
        keep_alive=None if view.keep_alive is None else _duration(view.keep_alive),
    )


def plan(view: PlanView) -> pipeline_service_pb2.PlanPipelineResponse:
    planned = view.planned
    return pipeline_service_pb2.PlanPipelineResponse(
        outcome=OUTCOMES[planned.outcome],
        worker=view.worker,
        components=[
            pipeline_service_pb2.PlannedComponent(
                role=part.role,
                class_name=part.class_name,
                digest=part.digest,
                weight_bytes=part.weight_bytes,
                dtype=DTYPES.get(part.dtype, artifact_pb2.DATA_TYPE_UNSPECIFIED),
                file_bytes=part.file_bytes,
                held=part.is_held,
            )
            for part in planned.components
        ],
        new_bytes=planned.new_bytes,
        shared_bytes=planned.shared_bytes,
        free_bytes=planned.free_bytes,
        evictable_bytes=planned.evictable_bytes,
        budget_bytes=planned.budget_bytes,
        evictions=[
            pipeline_service_pb2.PlannedEviction(
                digest=held.digest,
                class_name=held.class_name,
                freed_bytes=held.weight_bytes,
                pipelines=[name for name in held.pipelines if name in view.seen],
            )
            for held in planned.evicted
        ],
        download_bytes=planned.download_bytes,
        expected_load_duration=_duration(planned.load_seconds),
    )


def load_response(event: LoadProgress | PipelineView) -> pipeline_service_pb2.LoadPipelineResponse:
    if isinstance(event, PipelineView):
        return pipeline_service_pb2.LoadPipelineResponse(pipeline=pipeline(event))
    progress = pipeline_service_pb2.LoadProgress(
        phase=event.phase, role=event.role, completed_bytes=event.completed_bytes, total_bytes=event.total_bytes
    )
    if event.expected_end_time:
        progress.expected_end_time.FromMicroseconds(int(event.expected_end_time * 1e6))
    return pipeline_service_pb2.LoadPipelineResponse(progress=progress)


def watch_response(change: Change) -> pipeline_service_pb2.WatchPipelinesResponse:
    """One message for all who are told of the change: there may be hundreds."""
    view, made = change.pipeline, _watch_responses.setdefault(change, {})
    # Who may not know the owner gets another one.
    is_owner = view is not None and callers.current().owns(view.owner)
    if is_owner not in made:
        made[is_owner] = pipeline_service_pb2.WatchPipelinesResponse(
            change=CHANGES[change.kind], pipeline=pipeline(view) if view else None
        )
    return made[is_owner]


_watch_responses: WeakKeyDictionary[Change, dict[bool, pipeline_service_pb2.WatchPipelinesResponse]] = (
    WeakKeyDictionary()
)


def generate_response(numbered: Numbered[GenerationEvent]) -> generation_service_pb2.GenerateResponse:
    response = _event(numbered.event)
    response.sequence = numbered.sequence
    return response


def _event(event: GenerationEvent) -> generation_service_pb2.GenerateResponse:
    pb = generation_service_pb2
    match event:
        case Started():
            return pb.GenerateResponse(started=pb.Started(name=event.name, seeds=event.seeds))
        case Queued():
            queued = pb.Queued(position=event.position, expected_start_time=_maybe(event.expected_start_time))
            return pb.GenerateResponse(queued=queued)
        case Progress():
            progress = pb.Progress(
                completed_steps=event.completed_steps,
                total_steps=event.total_steps,
                expected_end_time=_maybe(event.expected_end_time),
            )
            return pb.GenerateResponse(progress=progress)
        case PhaseBegan():
            began = pb.PhaseBegan(phase=event.phase, expected_end_time=_maybe(event.expected_end_time))
            return pb.GenerateResponse(phase_began=began)
        case Preview():
            preview = pb.Preview(
                index=event.index,
                completed_steps=event.completed_steps,
                total_steps=event.total_steps,
                artifact=artifact_to_proto(event.artifact),
            )
            return pb.GenerateResponse(preview=preview)
        case Output():
            output = pb.Output(
                field=event.field,
                index=event.index,
                artifact=artifact_to_proto(event.artifact),
                seed=event.seed,
                group=event.group,
                width=event.width,
                height=event.height,
            )
            return pb.GenerateResponse(output=output)
        case Summary():
            return pb.GenerateResponse(summary=_summary(event))
    raise InternalError(f"A {type(event).__name__} needs a callback.")


def encode_prompt_response(events: Sequence[GenerationEvent]) -> generation_service_pb2.EncodePromptResponse:
    response = generation_service_pb2.EncodePromptResponse()
    values: dict[str, Plain] = {event.field: event.artifact for event in events if isinstance(event, Output)}
    for event in events:
        if isinstance(event, Summary):
            values |= event.finished.fields
            response.values.extend(to_proto(values[name]) for name in event.finished.field_names)
            response.is_tuple = event.finished.field_names != ("output",)
    return response


def interactive_response(
    numbered: Numbered[GenerationEvent],
) -> generation_service_pb2.GenerateInteractivelyResponse:
    pb = generation_service_pb2
    event = numbered.event
    if not isinstance(event, StepEnd):
        return pb.GenerateInteractivelyResponse(generate=generate_response(numbered))
    step_end = pb.StepEnd(
        callback=event.callback,
        step=event.step,
        timestep=to_proto(event.timestep),
        tensors={name: to_proto(value) for name, value in event.tensors.items()},
        state={name: to_proto(value) for name, value in event.state.items()},
    )
    return pb.GenerateInteractivelyResponse(step_end=step_end)


def generation(view: GenerationView) -> generation_service_pb2.Generation:
    pb = generation_service_pb2
    progress = view.progress
    return pb.Generation(
        name=view.name,
        pipeline=view.pipeline,
        state=GENERATION_STATES[view.state],
        on_disconnect=pb.ON_DISCONNECT_DETACH if view.detached else pb.ON_DISCONNECT_CANCEL,
        progress=_event(progress).progress if progress else None,
        seeds=view.seeds,
        output=pb.OutputFormat(output_type=view.output_type, media_type=view.media_type, quality=view.quality),
        create_time=timestamp(view.create_time),
        end_time=timestamp(view.end_time) if view.end_time else None,
        expire_time=timestamp(view.expire_time) if view.expire_time else None,
        result_bytes=view.size_bytes,
        error_reason=view.error_reason,
        error_message=view.error_message,
    )


def worker(view: WorkerView) -> worker_service_pb2.Worker:
    alive = view.state in (WorkerState.ACTIVE, WorkerState.DRAINING)
    return worker_service_pb2.Worker(
        name=view.name,
        state=WORKER_STATES[view.state],
        host=view.ready.host,
        pid=view.ready.pid if alive else 0,
        device=view.ready.device,
        device_name=view.ready.device_name,
        memory=_memory(view.snapshot, view.shared_saved_bytes) if view.snapshot else None,
        running_count=view.running_count,
        waiting_count=view.waiting_count,
        restart_count=view.restart_count,
        pipeline_count=view.pipeline_count,
        engine=_engine(view.snapshot) if view.snapshot else None,
    )


def timestamp(seconds: float) -> timestamp_pb2.Timestamp:
    message = timestamp_pb2.Timestamp()
    message.FromDatetime(datetime.fromtimestamp(seconds, UTC))
    return message


def _maybe(seconds: float | None) -> timestamp_pb2.Timestamp | None:
    return None if seconds is None else timestamp(seconds)


def _duration(seconds: float) -> duration_pb2.Duration:
    message = duration_pb2.Duration()
    message.FromNanoseconds(int(seconds * 1e9))
    return message


def _spec(spec: Spec) -> pipeline_service_pb2.PipelineSpec:
    return pipeline_service_pb2.PipelineSpec(
        repo_id=spec.repo_id,
        revision=spec.revision,
        variant=spec.variant,
        task=TASK_NUMBERS[spec.task],
        dtype=DTYPES.get(spec.dtype, artifact_pb2.DATA_TYPE_UNSPECIFIED),
        auto_dtype=spec.dtype == "auto",
        component_dtypes={role: DTYPES[dtype] for role, dtype in spec.component_dtypes.items()},
        subfolder=spec.subfolder,
        use_safetensors=spec.use_safetensors,
        overrides={role: overrides.message(value) for role, value in spec.overrides.items()},
        quantization_config={name: to_proto(value) for name, value in spec.quantization_config.items()},
        single_file=spec.single_file,
        config_source=overrides.component_message(spec.config_source) if spec.config_source is not None else None,
    )


def _derivation(step: Derivation) -> pipeline_service_pb2.Derivation:
    given = {role: overrides.message(value) for role, value in step.overrides.items()}
    return pipeline_service_pb2.Derivation(task=TASK_NUMBERS[step.task], overrides=given)


def _settings(settings: PipelineSettings) -> pipeline_service_pb2.PipelineSettings:
    return pipeline_service_pb2.PipelineSettings(
        noise_scheduler=_noise_scheduler(settings.noise_scheduler),
        adapters=[_adapter_call(call) for call in settings.adapters],
        features={name: _entries(arguments) for name, arguments in settings.features.items()},
    )


def _adapter_call(call: AdapterCall) -> adapter_pb2.AdapterCall:
    return adapter_pb2.AdapterCall(
        method=call.method,
        sources=[_adapter_source(source) for source in call.sources],
        arguments={name: to_proto(value) for name, value in call.arguments.items()},
    )


def _adapter_source(source: AdapterSource) -> adapter_pb2.AdapterSource:
    return adapter_pb2.AdapterSource(
        repo_id=source.repo_id,
        weight_name=source.weight_name,
        subfolder=source.subfolder,
        revision=source.revision,
    )


def _loaded_adapter(adapter: LoadedAdapter) -> adapter_pb2.LoadedAdapter:
    return adapter_pb2.LoadedAdapter(
        name=adapter.name,
        source=_adapter_source(adapter.source),
        digest=adapter.digest,
        roles=adapter.roles,
        active=adapter.is_active,
    )


def _configuration(loaded: Loaded) -> pipeline_service_pb2.Configuration:
    return pipeline_service_pb2.Configuration(
        pipeline={name: to_proto(value) for name, value in loaded.config.items()},
        components={role: _entries(config) for role, config in loaded.component_configs.items()},
    )


def _entries(values: Mapping[str, Plain]) -> artifact_pb2.MapValue:
    return artifact_pb2.MapValue(entries={name: to_proto(value) for name, value in values.items()})


def _noise_scheduler(scheduler: NoiseScheduler | None) -> artifact_pb2.NoiseScheduler | None:
    if scheduler is None:
        return None
    return artifact_pb2.NoiseScheduler(class_name=scheduler.class_name, config=_entries(scheduler.config or {}))


def _component(view: ComponentView) -> pipeline_service_pb2.Component:
    message = _part(view.component)
    message.sharer_count, message.residency = view.sharer_count, RESIDENCIES[view.residency]
    return message


def _part(part: Component) -> pipeline_service_pb2.Component:
    return pipeline_service_pb2.Component(
        role=part.role,
        class_name=part.class_name,
        digest=part.digest,
        weight_bytes=part.weight_bytes,
        dtype=DTYPES.get(part.dtype, artifact_pb2.DATA_TYPE_UNSPECIFIED),
    )


def _parameter(parameter: Parameter) -> pipeline_service_pb2.Parameter:
    default = to_proto(parameter.default) if parameter.has_default else None
    return pipeline_service_pb2.Parameter(
        name=parameter.name, annotation=parameter.annotation, default_value=default, required=parameter.required
    )


def _summary(summary: Summary) -> generation_service_pb2.Summary:
    finished = summary.finished
    return generation_service_pb2.Summary(
        queue_duration=_duration(summary.queue_seconds),
        run_duration=_duration(finished.run_seconds),
        device_duration=_duration(finished.device_seconds),
        encode_duration=_duration(finished.encode_seconds),
        call_count=finished.calls,
        joined_call_count=finished.joined_calls,
        max_joined_requests=finished.max_joined,
        seeds=summary.seeds,
        generators=[
            generation_service_pb2.Generator(device=device, state=state) for device, state in finished.generators
        ],
        fields={name: to_proto(value) for name, value in finished.fields.items()},
        field_names=finished.field_names,
        manifest=_manifest(summary.making, finished),
        replay_count=summary.replays,
        phase_durations={name: _duration(seconds) for name, seconds in finished.phase_seconds().items()},
        batch_sizes=dict(finished.batch_sizes),
        recoveries=finished.recoveries,
    )


def _manifest(making: Making, finished: Finished) -> generation_service_pb2.Manifest:
    command, loaded = making.command, making.loaded
    device_kind = making.ready.device.partition(":")[0]
    manifest = generation_service_pb2.Manifest(
        pipeline_class=loaded.pipeline_class,
        spec=_spec(making.recipe.spec),
        derivations=[_derivation(step) for step in making.recipe.derivations],
        settings=_settings(making.recipe.settings),
        components=[_part(part) for part in loaded.components if part.digest],
        noise_scheduler=_noise_scheduler(finished.noise_scheduler or loaded.noise_scheduler),
        arguments={name: to_proto(_without_media(value)) for name, value in command.arguments.items()},
        media={
            place: generation_service_pb2.MediaDigest(kind=kind, digest=digest)
            for place, (kind, digest) in finished.media.items()
        },
        seeds=command.seeds,
        generators=[
            generation_service_pb2.Generator(device=device, state=state) for device, state in command.generators
        ],
        generator_device=command.generators[0][0] if command.generators else "cpu",
        loaded_adapters=[_loaded_adapter(adapter) for adapter in loaded.adapters],
        adapter_digests=finished.adapter_digests,
        joined=finished.joined_calls > 0,
        output_type=command.output_type,
        device_kind=device_kind,
        device_name=making.ready.device_name,
        version=__version__,
        library_versions=making.ready.library_versions,
    )
    if command.adapters is not None:
        manifest.adapters.SetInParent()
        manifest.adapters.adapters.extend(_adapter(adapter) for adapter in command.adapters)
    return manifest


def _adapter(adapter: Adapter) -> adapter_pb2.Adapter:
    scale = to_proto(adapter.scale)
    if adapter.source is None:
        return adapter_pb2.Adapter(name=adapter.name, scale=scale)
    return adapter_pb2.Adapter(source=_adapter_source(adapter.source), scale=scale)


def _without_media(value: Plain) -> Plain:
    match value:
        case Artifact():
            return None
        case list() | tuple():
            return [_without_media(item) for item in value]
        case Mapping():
            return {key: _without_media(item) for key, item in value.items()}
    return value


def _memory(snapshot: Snapshot, shared_saved_bytes: int) -> worker_service_pb2.DeviceMemory:
    memory = snapshot.memory
    return worker_service_pb2.DeviceMemory(
        total_bytes=snapshot.total_bytes,
        budget_bytes=snapshot.budget_bytes,
        weight_bytes=snapshot.weight_bytes,
        reserved_bytes=snapshot.reserved_bytes,
        shared_saved_bytes=shared_saved_bytes,
        process_bytes=snapshot.process_bytes,
        working_set_bytes=memory.working_set_bytes,
        working_set_budget_bytes=memory.working_set_budget_bytes,
        headroom_bytes=memory.headroom_bytes,
        cached_bytes=memory.cached_bytes,
        free_bytes=memory.free_bytes,
        unaccounted_bytes=memory.unaccounted_bytes,
        evictable_bytes=memory.evictable_bytes,
        unreclaimed_bytes=memory.unreclaimed_bytes,
    )


def _engine(snapshot: Snapshot) -> worker_service_pb2.EngineStats:
    return worker_service_pb2.EngineStats(
        call_count=snapshot.calls,
        batch_count=snapshot.batches,
        joined_call_count=snapshot.joined_calls,
        verified_kind_count=snapshot.verified_kinds,
        refused_kind_count=snapshot.refused_kinds,
        methods=[
            worker_service_pb2.MethodStats(
                method=stats.method,
                call_count=stats.calls,
                joined_call_count=stats.joined_calls,
                lone_call_counts=stats.lone_calls,
                verified_kind_count=stats.verified_kinds,
                refused_kind_count=stats.refused_kinds,
                agreed_difference=stats.agreed_difference,
                refused_difference=stats.refused_difference,
            )
            for stats in snapshot.methods
        ],
        fused_generation_count=snapshot.fused_requests,
        fusible_kind_count=snapshot.fusible_kinds,
        unfusible_kind_count=snapshot.unfusible_kinds,
        embedding_hit_count=snapshot.embedding_hits,
        embedding_bytes=snapshot.embedding_bytes,
        recovery_counts=snapshot.memory.recoveries,
    )

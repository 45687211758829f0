"""What callers put in place of a checkpoint's own parts, between protos and plain values."""

from __future__ import annotations

from collections.abc import Mapping

from denoised.errors import InvalidFieldError
from denoised.v1 import artifact_pb2, pipeline_service_pb2
from denoised.values import DTYPES, Plain, from_proto, to_proto

from .messages import ComponentSource, Override

# Of the texts that say what to load.
MAX_LENGTH = 1024
MAX_COMPONENTS = 16
WEIGHT_DTYPES: Mapping[int, str] = {DTYPES[name]: name for name in ("float32", "float16", "bfloat16", "float64")}


def parse(overrides: Mapping[str, pipeline_service_pb2.Override], field: str) -> dict[str, Override]:
    """By role. Raises InvalidFieldError."""
    return {text(role, field): _override(override, f"{field}[{role}]") for role, override in overrides.items()}


def message(override: Override) -> pipeline_service_pb2.Override:
    match override:
        case ComponentSource():
            return pipeline_service_pb2.Override(component=component_message(override))
        case tuple():
            components = [component_message(source) for source in override if isinstance(source, ComponentSource)]
            return pipeline_service_pb2.Override(components=pipeline_service_pb2.ComponentList(components=components))
    return pipeline_service_pb2.Override(value=to_proto(override))


def text(given: str, field: str) -> str:
    if len(given) > MAX_LENGTH:
        raise InvalidFieldError.of(field, f"it is longer than {MAX_LENGTH:,} characters.", hint="Send a shorter one.")
    return given


def dtype(number: int, field: str, default: str) -> str:
    if number == artifact_pb2.DATA_TYPE_UNSPECIFIED:
        return default
    if number not in WEIGHT_DTYPES:
        names = ", ".join(WEIGHT_DTYPES.values())
        raise InvalidFieldError.of(field, "weights cannot be held in this type.", hint=f"Take {names}.")
    return WEIGHT_DTYPES[number]


def _override(override: pipeline_service_pb2.Override, field: str) -> Override:
    match override.WhichOneof("kind"):
        case "value":
            return _value(override.value, field)
        case "component":
            return component_source(override.component, field)
        case "components":
            given = override.components.components
            if not 1 <= len(given) <= MAX_COMPONENTS:
                raise InvalidFieldError.of(
                    field, f"it has {len(given)} components.", hint=f"Send 1 to {MAX_COMPONENTS}."
                )
            return tuple(component_source(source, f"{field}[{index}]") for index, source in enumerate(given))
    raise InvalidFieldError.of(field, "it is empty.", hint="Set a value, a component or components.")


def component_source(source: pipeline_service_pb2.ComponentSource, field: str) -> ComponentSource:
    if source.repo_id and source.pipeline:
        raise InvalidFieldError.of(
            f"{field}.pipeline", "it is set beside repo_id.", hint="Name a repository or a live pipeline, not both."
        )
    if source.pipeline and not source.role:
        raise InvalidFieldError.of(f"{field}.role", "it is empty.", hint="Say which part of the pipeline is meant.")
    if not (source.repo_id or source.pipeline or source.class_name):
        raise InvalidFieldError.of(
            f"{field}.repo_id", "it is empty.", hint="Name a repository, a live pipeline, or a class with its config."
        )
    return ComponentSource(
        repo_id=text(source.repo_id, f"{field}.repo_id"),
        subfolder=text(source.subfolder, f"{field}.subfolder"),
        revision=text(source.revision, f"{field}.revision"),
        variant=text(source.variant, f"{field}.variant"),
        class_name=text(source.class_name, f"{field}.class_name"),
        pipeline=text(source.pipeline, f"{field}.pipeline"),
        role=text(source.role, f"{field}.role"),
        config={name: _value(value, f"{field}.config[{name}]") for name, value in source.config.items()},
        dtype=dtype(source.dtype, f"{field}.dtype", ""),
        use_safetensors=source.use_safetensors if source.HasField("use_safetensors") else None,
    )


def component_message(source: ComponentSource) -> pipeline_service_pb2.ComponentSource:
    return pipeline_service_pb2.ComponentSource(
        repo_id=source.repo_id,
        subfolder=source.subfolder,
        revision=source.revision,
        variant=source.variant,
        class_name=source.class_name,
        pipeline=source.pipeline,
        role=source.role,
        config={name: to_proto(value) for name, value in source.config.items()},
        dtype=DTYPES.get(source.dtype, artifact_pb2.DATA_TYPE_UNSPECIFIED),
        use_safetensors=source.use_safetensors,
    )


def _value(value: artifact_pb2.Value, field: str) -> Plain:
    match value.WhichOneof("kind"):
        case None:
            raise InvalidFieldError.of(
                field, "its value is not set.", hint="Leave it out, or send null_value for None."
            )
        case "artifact_value":
            raise InvalidFieldError.of(field, "it is media.", hint="Send a number, a truth value, a text or a list.")
        case "string_value":
            text(value.string_value, field)
    return from_proto(value)

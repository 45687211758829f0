"""What to load: the arguments of `from_pretrained` and `from_pipe` as `denoised.v1.PipelineSpec` and its parts."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InvalidFieldError
from .v1 import artifact_pb2, pipeline_service_pb2
from .values import DTYPE_NAMES, DTYPES

TASKS = {
    "text-to-image": pipeline_service_pb2.TASK_TEXT_TO_IMAGE,
    "image-to-image": pipeline_service_pb2.TASK_IMAGE_TO_IMAGE,
    "inpainting": pipeline_service_pb2.TASK_INPAINTING,
    "text-to-audio": pipeline_service_pb2.TASK_TEXT_TO_AUDIO,
    "text-to-video": pipeline_service_pb2.TASK_TEXT_TO_VIDEO,
    "image-to-video": pipeline_service_pb2.TASK_IMAGE_TO_VIDEO,
    "video-to-video": pipeline_service_pb2.TASK_VIDEO_TO_VIDEO,
}
TASK_NAMES = {number: name for name, number in TASKS.items()}
WEIGHT_DTYPES = ("float32", "float16", "bfloat16", "float64")
DTYPE_ALIASES = {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}

# Arguments of diffusers' from_pretrained that steer how this process would read files. The daemon reads them, so
# ignoring these changes nothing about the pipeline.
IGNORED = frozenset(
    {"cache_dir", "local_files_only", "low_cpu_mem_usage", "mirror", "offload_state_dict", "resume_download"}
)
# Arguments that would change something and cannot; harmless only with the values given, for the reason given.
REFUSED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "custom_pipeline": ((None,), "The daemon runs diffusers' own classes only."),
    "custom_revision": ((None,), "The daemon runs diffusers' own classes only."),
    "device_map": ((None,), "The daemon decides which device holds the weights."),
    "force_download": ((None, False), "Clear the cache where the daemon runs."),
    "from_flax": ((None, False), "Convert the weights to safetensors."),
    "max_memory": ((None,), "Memory budgets are settings of the daemon."),
    "offload_folder": ((None,), "The daemon decides where weights are kept."),
    "output_loading_info": ((None, False), "Missing and unexpected keys are not reported."),
    "proxies": ((None,), "Set HTTPS_PROXY where the daemon runs."),
    "quantization_config": ((None,), "Quantised loading is not supported yet."),
    "token": (
        (None, False),
        "Log in to the Hub where the daemon runs; the daemon's own token goes to denoised.Client.",
    ),
    "trust_remote_code": ((None, False), "The daemon runs diffusers' own classes only."),
    "use_auth_token": ((None, False), "Log in to the Hub where the daemon runs."),
}
LOAD_ARGUMENTS = (
    "torch_dtype", "dtype", "variant", "revision", "use_safetensors", "ttl", "pipeline_id", "request_id", "shared",
    "timeout",
)  # fmt: skip
DERIVE_ARGUMENTS = ("ttl", "pipeline_id", "request_id", "shared", "timeout")


def suggest(name: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    """A question for people, or nothing."""
    nearest = difflib.get_close_matches(name, known, 1, cutoff)
    return f"Did you mean {nearest[0]!r}?" if nearest else ""


def task_number(task: str) -> pipeline_service_pb2.Task.ValueType:
    """Raises InvalidFieldError for an unknown name. Empty means the class that the checkpoint names."""
    if not task:
        return pipeline_service_pb2.TASK_UNSPECIFIED
    if task not in TASKS:
        raise InvalidFieldError.of("task", f"{task!r} is no task.", hint=suggest(task, [*TASKS]) or one_of(TASKS))
    return TASKS[task]


def dtype_number(dtype: Any) -> artifact_pb2.DataType.ValueType:
    """The element type of weights, from its name, a torch.dtype or a NumPy type. None leaves it to the daemon."""
    if dtype is None:
        return artifact_pb2.DATA_TYPE_UNSPECIFIED
    # torch.float16 says "torch.float16"; asking it so needs no torch.
    name = dtype.__name__ if isinstance(dtype, type) and issubclass(dtype, np.generic) else str(dtype)
    name = name.removeprefix("torch.")
    name = DTYPE_ALIASES.get(name, name)
    if name not in WEIGHT_DTYPES:
        hint = suggest(name, WEIGHT_DTYPES) or one_of(WEIGHT_DTYPES)
        raise InvalidFieldError.of("dtype", f"{name!r} is no element type for weights.", hint=hint)
    return DTYPES[name]


def dtype_name(number: artifact_pb2.DataType.ValueType) -> str:
    return DTYPE_NAMES.get(number, "")


def one_of(names: Sequence[str] | Mapping[str, object]) -> str:
    return "Use one of " + ", ".join(names) + "."


def source(pretrained_model_or_path: str | os.PathLike[str], markers: Sequence[str] = ("model_index.json",)) -> str:
    """Directories become absolute, as the daemon has another working directory; other names stay as they are.

    A directory that is named like a repository is one when it has one of the `markers`.
    """
    text = os.fspath(pretrained_model_or_path)
    path = Path(text)
    is_path = isinstance(pretrained_model_or_path, os.PathLike) or text.startswith((".", "/"))
    # A directory that merely shares its name with a repository or an embedded model is not meant.
    if is_path or any((path / marker).is_file() for marker in markers):
        return str(path.absolute().resolve())
    return text


def full_name(name: str) -> str:
    """Ids alone are taken for handles."""
    return name if not name or "/" in name else f"pipelines/{name}"


def split_load_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `from_pretrained` was given, as arguments of `Client.load` and as overrides.

    Raises:
        InvalidFieldError: An argument cannot work with a daemon, or its name looks like a slip.
    """
    settings, replaced = _split(arguments, LOAD_ARGUMENTS)
    if "torch_dtype" in settings:
        torch_dtype = settings.pop("torch_dtype")
        if settings.get("dtype") is None:
            settings["dtype"] = torch_dtype
    for name in ("variant", "revision", "pipeline_id", "request_id"):
        if name in settings and settings[name] is None:
            del settings[name]
    return _checked(settings), replaced


def split_derive_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `from_pipe` was given, as arguments of `Client.derive` and as overrides. Raises as for loading."""
    for name in ("torch_dtype", "dtype"):
        if arguments.get(name) is not None:
            raise InvalidFieldError.of(
                name, "a derived pipeline shares the weights of its source.", hint="Load the checkpoint again instead."
            )
    kept = {key: arguments[key] for key in arguments if key not in ("torch_dtype", "dtype")}
    settings, replaced = _split(kept, DERIVE_ARGUMENTS)
    return _checked(settings), replaced


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    for name in ("variant", "revision", "pipeline_id", "request_id"):
        if not isinstance(settings.get(name, ""), str):
            raise InvalidFieldError.of(name, f"{settings[name]!r} is no text.", hint="Write it in quotes.")
    return settings


def _split(arguments: Mapping[str, Any], known: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    settings: dict[str, Any] = {}
    replaced: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in known:
            settings[name] = value
        elif name in REFUSED:
            harmless, reason = REFUSED[name]
            if not any(value is allowed for allowed in harmless):
                raise InvalidFieldError.of(name, f"{value!r} has no meaning for a daemon.", hint=reason)
        elif name not in IGNORED:
            # Roles are an open set that only the daemon knows: a near miss is refused here, the rest there.
            if hint := suggest(name, [*known, *REFUSED, *IGNORED], cutoff=0.8):
                raise InvalidFieldError.of(name, "there is no such argument.", hint=hint)
            replaced[name] = value
    return settings, replaced

"""What to load: the arguments of `from_pretrained` and `from_pipe` as `denoised.v1.PipelineSpec` and its parts."""

from __future__ import annotations

import difflib
import os
import re
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
LINK = re.compile(
    r"((https?://)?(huggingface\.co|hf\.co)/)?"
    r"(?P<repo_id>[^/:]+/[^/]+)/((blob|resolve)/(?P<revision>[^/]+)/)?(?P<file>.+)"
)
DTYPE_ALIASES = {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}


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


def dtype_fields(dtype: Any) -> dict[str, Any]:
    """Fields of a PipelineSpec for one element type, "auto" for that of the files, or a dict by role with "default"."""
    by_role: dict[str, Any] = {}
    if isinstance(dtype, Mapping):
        by_role = dict(dtype)
        dtype = by_role.pop("default", None)
    fields: dict[str, Any] = {"component_dtypes": {str(role): dtype_number(given) for role, given in by_role.items()}}
    return fields | ({"auto_dtype": True} if dtype == "auto" else {"dtype": dtype_number(dtype)})


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


def single_file(link_or_path: str | os.PathLike[str]) -> tuple[str, str, str]:
    """Repository or directory, the file in it, and the revision, of what diffusers' `from_single_file` is given.

    That is a path, a link to a file on the Hub, or "owner/name/file".
    """
    text = os.fspath(link_or_path)
    link = LINK.fullmatch(text)
    is_path = isinstance(link_or_path, os.PathLike) or text.startswith((".", "/")) or Path(text).is_file()
    if link is None or is_path:
        path = Path(text).absolute()
        return str(path.parent.resolve()), path.name, ""
    return link["repo_id"], link["file"], link["revision"] or ""


def full_name(name: str, prefix: str = "pipelines/") -> str:
    """Ids alone are given the prefix, by default that of handles."""
    return name if not name or "/" in name else prefix + name

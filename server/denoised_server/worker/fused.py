"""Values of requests that run as one `__call__`: their arguments, told apart by kind, and its result, taken apart."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerBase

from . import splitting
from .splitting import NotSplittableError

# What a member of the proof that is nobody's asks for in addition: long enough to be padded otherwise.
OTHERWISE = "beside an old stone bridge over a quiet river in the evening"
# How far pixels and other numbers of a whole run may be apart, by the element type of the weights: rounding of each
# call, carried through all steps. Pixels of a picture are whole numbers, so they may always be off by one.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
PIXEL = 1 / 255

_numbers = itertools.count()
_known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def together(calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Arguments of one call that stands for all of them; they are of one kind."""
    first = calls[0]
    return {name: [call[name] for call in calls] if _is_each(name, first[name]) else first[name] for name in first}


def otherwise(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the same kind, all different where they may be."""
    return {name: _otherwise(value) if _varies(name, value) else value for name, value in arguments.items()}


def _otherwise(value: Any) -> Any:
    return f"{value} {OTHERWISE}" if isinstance(value, str) else value.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _is_each(name: str, value: Any) -> bool:
    """Whether the argument becomes a list, with one element for each request."""
    return isinstance(value, Image.Image) or (isinstance(value, str) and "prompt" in name)


def _varies(name: str, value: Any) -> bool:
    """Whether the argument may differ between requests of one kind."""
    return _is_each(name, value) and (isinstance(value, Image.Image) or name.startswith("prompt"))


def likeness(arguments: Mapping[str, Any], media: Mapping[str, tuple[str, str]]) -> Hashable:
    """Equal for arguments that are fit for `together`; None for those that are not. `media` are their fingerprints."""
    if not isinstance(arguments.get("prompt"), str) or any(kind != "image" for kind, _ in media.values()):
        # Tensors have a row for each sample.
        return None
    return (
        tuple((name, _trait(name, value)) for name, value in sorted(arguments.items())),
        tuple(sorted((place, digest) for place, (_, digest) in media.items() if place not in arguments)),
    )


def _trait(name: str, value: Any) -> Hashable:
    if not _varies(name, value):
        return plain(value)
    return (value.mode, value.size) if isinstance(value, Image.Image) else str


def identity(pipeline: DiffusionPipeline) -> Hashable:
    """Equal for pipelines that do the same with the same components."""
    parts: list[Any] = [type(pipeline)]
    for name, value in vars(pipeline).items():
        if isinstance(value, nn.Module | PreTrainedTokenizerBase):
            # Not id(), which a later object may have again.
            if (number := _known.get(value)) is None:
                number = _known[value] = next(_numbers)
            parts.append((name, number))
        elif isinstance(value, SchedulerMixin):
            parts.append((name, type(value), repr(value.config)))
        elif isinstance(value, DiffusionPipeline):
            parts.append((name, identity(value)))
        elif isinstance(value, bool | int | float | str | None):
            parts.append((name, value))
    return tuple(parts)


def plain(value: Any) -> Hashable:
    """A value without media, for comparing: these have fingerprints."""
    if isinstance(value, Mapping):
        return tuple((name, plain(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(map(plain, value))
    return type(value), value if isinstance(value, bool | int | float | str | None) else None


def parts(result: Any, count: int) -> list[Any]:
    """A pipeline's output as one output for each request. Raises NotSplittableError."""
    if not dataclasses.is_dataclass(result):
        raise NotSplittableError(f"a result of type {type(result).__name__} cannot be taken apart")
    kind: Any = type(result)
    # Not as a mapping: diffusers leaves fields that are None out of it.
    fields = {field.name: list(_rows(getattr(result, field.name), count)) for field in dataclasses.fields(kind)}
    return [kind(**{name: rows[index] for name, rows in fields.items()}) for index in range(count)]


def _rows(value: Any, count: int) -> Iterator[Any]:
    if value is None:
        yield from [None] * count
    elif isinstance(value, Sequence | torch.Tensor | np.ndarray) and len(value) == count:
        yield from (value[index : index + 1] for index in range(count))
    else:
        raise NotSplittableError("a result has not one part for each request")


def agree(fused: Any, alone: Any, dtype: torch.dtype) -> bool:
    """Whether two outputs are the same but for rounding."""
    if isinstance(alone, Mapping):
        return type(fused) is type(alone) and all(agree(fused[name], value, dtype) for name, value in alone.items())
    if isinstance(alone, list | tuple):
        return len(fused) == len(alone) and all(map(agree, fused, alone, itertools.repeat(dtype)))
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
    if isinstance(alone, Image.Image):
        left, right = (torch.from_numpy(np.asarray(image).copy()) / 255 for image in (fused, alone))
        return left.shape == right.shape and float((left - right).abs().max()) <= max(tolerance, 1.5 * PIXEL)
    if isinstance(alone, np.ndarray):
        return agree(torch.from_numpy(fused), torch.from_numpy(alone), dtype)
    if isinstance(alone, torch.Tensor) and alone.is_floating_point():
        return bool(splitting.difference(fused, alone) * splitting.TOLERANCE.get(alone.dtype, 1e-4) <= tolerance)
    return bool(torch.equal(fused, alone)) if isinstance(alone, torch.Tensor) else bool(fused == alone)

"""Several calls of one component as one call, and its result as several results.

Nothing here knows a family. A call's arguments are taken apart into leaves; leaves with one row per sample are
concatenated, scalar tensors (timesteps) become one row per sample, and everything else has to be equal. What that
cannot know, whether the component treats samples independently, is verified by running both ways once for each kind
of call.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

# Largest difference between a joined and a lone result that counts as rounding, as a share of the largest element.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


class NotJoinableError(Exception):
    """The calls do not fit together, or the result cannot be taken apart."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """A call's arguments taken apart.

    `structure` and `traits` decide what joins with what; `rows` is the number of samples.
    """

    structure: Hashable
    traits: tuple[Hashable, ...]
    leaves: tuple[Any, ...]
    rows: int

    @property
    def key(self) -> Hashable:
        return self.structure, self.traits


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Parameters by which positional arguments get their names; empty where the function takes them as they come."""
    found = list(inspect.signature(function).parameters.values())
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in found):
        return []
    return found


def describe(names: list[inspect.Parameter], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments | None:
    """None when the call has no batch dimension to join along."""
    if names:
        # The same call is spelled differently by different pipelines: positions get names, spelled-out defaults go.
        named = {parameter.name: value for parameter, value in zip(names, args, strict=False)} | dict(kwargs)
        defaults = {parameter.name: parameter.default for parameter in names}
        named = {name: named[name] for name in sorted(named) if named[name] is not defaults.get(name, named)}
        args, kwargs = (), named
    leaves: list[Any] = []
    structure = _flatten((args, dict(kwargs)), leaves)
    rows = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() >= 2), 0)
    if rows == 0:
        return None
    return Arguments(structure, tuple(_trait(leaf, rows) for leaf in leaves), tuple(leaves), rows)


def join(calls: Sequence[Arguments]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of one call that stands for all of them; the calls have equal keys."""
    rows = [call.rows for call in calls]
    joined = iter([_join_leaf(leaf, rows) for leaf in zip(*(call.leaves for call in calls), strict=True)])
    args, kwargs = _unflatten(calls[0].structure, joined)
    return args, kwargs


def split(result: Any, rows: Sequence[int]) -> list[Any]:
    """The result of a joined call as one result for each call."""
    parts, low, total = [], 0, sum(rows)
    for count in rows:
        parts.append(_part(result, low, low + count, total))
        low += count
    return parts


def difference(joined: Any, alone: Any) -> float:
    """Largest difference between two results, in units of the tolerance: up to 1 counts as rounding."""
    if isinstance(alone, torch.Tensor):
        if joined.shape != alone.shape or joined.dtype != alone.dtype:
            return float("inf")
        if not alone.is_floating_point():
            return 0.0 if torch.equal(joined, alone) else float("inf")
        if alone.numel() == 0:
            return 0.0
        if not bool(torch.isfinite(alone).all()):
            return 0.0 if torch.equal(torch.isfinite(joined), torch.isfinite(alone)) else float("inf")
        scale = max(float(alone.abs().max()), 1e-6)
        return float((joined.float() - alone.float()).abs().max()) / scale / TOLERANCE.get(alone.dtype, 1e-4)
    if isinstance(alone, DiagonalGaussianDistribution):
        return difference(joined.parameters, alone.parameters)
    if isinstance(alone, Mapping):
        return max((difference(joined[name], alone[name]) for name in alone), default=0.0)
    if isinstance(alone, list | tuple):
        return max((difference(left, right) for left, right in zip(joined, alone, strict=True)), default=0.0)
    return 0.0 if joined == alone else float("inf")


def _flatten(value: Any, leaves: list[Any]) -> Hashable:
    kind = type(value)
    if kind is tuple or kind is list:
        return (kind, tuple(_flatten(item, leaves) for item in value))
    if kind is dict:
        return (kind, tuple((name, _flatten(item, leaves)) for name, item in value.items()))
    leaves.append(value)
    return None


def _unflatten(structure: Any, leaves: Any) -> Any:
    if structure is None:
        return next(leaves)
    kind, parts = structure
    if kind is dict:
        return {name: _unflatten(part, leaves) for name, part in parts}
    return kind(_unflatten(part, leaves) for part in parts)


def _trait(leaf: Any, rows: int) -> Hashable:
    """What has to agree between two leaves in the same place."""
    if isinstance(leaf, torch.Tensor):
        if leaf.dim() == 0:
            return "scalar", leaf.device
        if leaf.shape[0] == rows:
            # Noise schedulers count timesteps in integers or floats; one row each, they may be joined as floats.
            dtype = None if leaf.dim() == 1 else leaf.dtype
            return "rows", leaf.shape[1:], dtype, leaf.device
        return "whole", leaf.shape, leaf.dtype, leaf.device
    try:
        hash(leaf)
    except TypeError:
        return "object", id(leaf)
    return type(leaf), leaf


def _join_leaf(values: tuple[Any, ...], rows: Sequence[int]) -> Any:
    first = values[0]
    if not isinstance(first, torch.Tensor):
        return first
    if first.dim() == 0:
        return _concatenate([value.reshape(1).expand(count) for value, count in zip(values, rows, strict=True)])
    if all(value.shape[0] == count for value, count in zip(values, rows, strict=True)):
        return _concatenate(values)
    if all(torch.equal(value, first) for value in values):
        return first
    raise NotJoinableError("a tensor without a batch dimension differs between the calls")


def _concatenate(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    if any(tensor.dtype != tensors[0].dtype for tensor in tensors):
        tensors = [tensor.float() for tensor in tensors]
    return torch.cat(list(tensors))


def _part(value: Any, low: int, high: int, total: int) -> Any:
    if isinstance(value, torch.Tensor):
        if value.dim() == 0 or value.shape[0] != total:
            raise NotJoinableError("the result has no batch dimension")
        return value[low:high]
    if isinstance(value, DiagonalGaussianDistribution):
        return DiagonalGaussianDistribution(_part(value.parameters, low, high, total), value.deterministic)
    if isinstance(value, OrderedDict):  # outputs of diffusers and transformers
        return type(value)(**{name: _part(item, low, high, total) for name, item in value.items()})
    if type(value) in (list, tuple):
        return type(value)(_part(item, low, high, total) for item in value)
    if value is None:
        return None
    raise NotJoinableError(f"a result of type {type(value).__name__} cannot be taken apart")

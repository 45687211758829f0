"""Several calls of one component as one call, and its result as several results.

Nothing here knows a family. A call's arguments are taken apart into leaves; leaves with one row per sample are
concatenated, scalar tensors (timesteps) become one row per sample, and everything else has to be equal. What that
cannot know, whether the component treats samples independently, is verified by running both ways once for each kind
of call.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

# Difference between a joined and a lone result that counts as rounding, as a share of the elements' size.
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

    @property
    def variable(self) -> int:
        """How many leaves may differ between calls that are joined."""
        return sum(isinstance(trait, tuple) and trait[0] in ("rows", "scalar") for trait in self.traits)


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


def varied(calls: Sequence[Arguments]) -> frozenset[int]:
    """Places of the leaves that are not the same in all calls."""
    columns = zip(*(call.leaves for call in calls), strict=True)
    return frozenset(place for place, column in enumerate(columns) if not _same(column))


def dtypes(calls: Sequence[Arguments]) -> tuple[frozenset[torch.dtype], ...]:
    """Element types that come together in each place that holds one number for a sample."""
    columns = zip(*(call.leaves for call in calls), strict=True)
    return tuple(
        frozenset(leaf.dtype for leaf in column)
        for column in columns
        if isinstance(column[0], torch.Tensor) and column[0].dim() <= 1
    )


def split(result: Any, rows: Sequence[int]) -> list[Any]:
    """The result of a joined call as one result for each call."""
    parts, low, total = [], 0, sum(rows)
    for count in rows:
        parts.append(_part(result, low, low + count, total))
        low += count
    return parts


def difference(joined: Any, alone: Any) -> float:
    """Largest difference between two results, in units of the tolerance: up to 1 counts as rounding.

    An element may be off by the tolerance times its own size and the typical size together: a single huge activation
    hides nothing. NaN when a result is not finite, from which nothing can be concluded.
    """
    if isinstance(alone, torch.Tensor):
        if joined.shape != alone.shape or joined.dtype != alone.dtype:
            return float("inf")
        if not alone.is_floating_point():
            return 0.0 if torch.equal(joined, alone) else float("inf")
        if alone.numel() == 0:
            return 0.0
        left, right = joined.double(), alone.double()
        typical = float(right.square().mean().sqrt())
        allowed = TOLERANCE.get(alone.dtype, 1e-4) * (right.abs() + max(typical, 1e-6))
        return float(((left - right).abs() / allowed).max())
    if isinstance(alone, DiagonalGaussianDistribution):
        return difference(joined.parameters, alone.parameters)
    if isinstance(alone, Mapping):
        return worst(difference(joined[name], alone[name]) for name in alone)
    if isinstance(alone, list | tuple):
        return worst(difference(left, right) for left, right in zip(joined, alone, strict=True))
    return 0.0 if joined == alone else float("inf")


def worst(differences: Iterable[float]) -> float:
    """The largest; NaN if one is."""
    found = list(differences)
    return max(found, default=0.0) if not any(map(math.isnan, found)) else math.nan


def _same(column: tuple[Any, ...]) -> bool:
    first = column[0]
    if isinstance(first, torch.Tensor):
        return all(other.shape == first.shape and bool((other == first).all()) for other in column[1:])
    return True


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
    if isinstance(leaf, torch.Generator):
        return "generator", leaf.device
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
    if isinstance(first, torch.Generator):
        # VAEs take one and most ignore it. One of its own: a call that draws from it is found to differ, and the
        # requests' generators stay where they are.
        return torch.Generator(first.device).set_state(first.get_state())
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

"""The result of a joined call as one result for each call, and how far results are apart.

How a result is taken apart is not guessed: it is seen from a joined result and the lone ones of the same calls. Along
whichever dimension the joined one is as long as all lone ones together, there it is cut; what is as long as each of
them is the same for all.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

# Difference between a joined and a lone result that counts as rounding, as a share of the elements' size.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}

# Where a tensor is cut: the dimension, or None for one that is the same for all calls. A list with one element for each
# sample is cut at ELEMENTS. Of a container, the layouts of what is in it.
Layout: TypeAlias = Any
ELEMENTS = "elements"


class NotSplittableError(Exception):
    """A result cannot be taken apart."""


def layout(joined: Any, alone: Sequence[Any]) -> Layout:
    """How the joined result is put together of what the lone ones are. Raises NotSplittableError."""
    if any(type(each) is not type(joined) for each in alone):
        raise NotSplittableError("the joined result is of another type than the lone ones")
    if isinstance(joined, torch.Tensor):
        return _cut(joined.shape, [each.shape for each in alone])
    if isinstance(joined, list | tuple):
        lengths = [len(each) for each in alone]
        if len(joined) == sum(lengths) and len(joined) != lengths[0]:
            return ELEMENTS
        if any(length != len(joined) for length in lengths):
            raise NotSplittableError("a list is neither as long as each lone one nor as all of them")
        return [layout(part, parts) for part, *parts in zip(joined, *alone, strict=True)]
    if (parts := contents(joined)) is not None:
        others = [contents(each) or {} for each in alone]
        if any(other.keys() != parts.keys() for other in others):
            raise NotSplittableError("the joined result has not the parts that lone ones have")
        return {name: layout(part, [other[name] for other in others]) for name, part in parts.items()}
    return None


def split(result: Any, rows: Sequence[int], cuts: Layout) -> list[Any]:
    """One result for each call, of so many samples. Raises NotSplittableError."""
    results, low, total = [], 0, sum(rows)
    for count in rows:
        results.append(_part(result, low, low + count, total, cuts))
        low += count
    return results


def difference(joined: Any, alone: Any) -> float:
    """Largest difference between two results, in units of the tolerance: up to 1 counts as rounding.

    An element may be off by the tolerance times its own size and the typical size together: a single huge activation
    hides nothing. NaN when a result is not finite, from which nothing can be concluded.
    """
    if isinstance(alone, torch.Tensor):
        if joined.shape != alone.shape or joined.dtype != alone.dtype:
            return math.inf
        if not alone.is_floating_point():
            return 0.0 if torch.equal(joined, alone) else math.inf
        if alone.numel() == 0:
            return 0.0
        left, right = joined.double(), alone.double()
        typical = float(right.square().mean().sqrt())
        allowed = TOLERANCE.get(alone.dtype, 1e-4) * (right.abs() + max(typical, 1e-6))
        return float(((left - right).abs() / allowed).max())
    if isinstance(alone, list | tuple):
        if len(joined) != len(alone):
            return math.inf
        return worst(difference(left, right) for left, right in zip(joined, alone, strict=True))
    if (parts := contents(alone)) is not None:
        others = contents(joined) or {}
        return worst(difference(others[name], part) for name, part in parts.items())
    return 0.0 if joined == alone else math.inf


def worst(differences: Iterable[float]) -> float:
    """The largest; NaN if one is."""
    found = list(differences)
    return max(found, default=0.0) if not any(map(math.isnan, found)) else math.nan


def contents(value: Any) -> Mapping[str, Any] | None:
    """What a container that is no list holds; None for what is none."""
    if isinstance(value, Mapping):  # outputs of diffusers and transformers too
        return dict(value)
    if isinstance(value, DiagonalGaussianDistribution):
        return {"parameters": value.parameters}
    if isinstance(value, Cache):
        return {"layers": value.layers}
    return dict(vars(value)) if isinstance(value, CacheLayerMixin) else None


def _cut(joined: torch.Size, alone: Sequence[torch.Size]) -> int | None:
    if any(len(shape) != len(joined) for shape in alone):
        raise NotSplittableError("the joined result has not the dimensions of lone ones")
    differing = [place for place, length in enumerate(joined) if any(shape[place] != length for shape in alone)]
    if not differing:
        return None
    (place, *more) = differing
    if more or joined[place] != sum(shape[place] for shape in alone):
        raise NotSplittableError("the joined result is not as long as all lone ones together")
    return place


def _part(value: Any, low: int, high: int, total: int, cuts: Layout) -> Any:
    if cuts is None:
        return value
    if isinstance(value, torch.Tensor):
        start, stop = _bounds(value.shape[cuts], low, high, total)
        return value.narrow(cuts, start, stop - start)
    if cuts == ELEMENTS:
        start, stop = _bounds(len(value), low, high, total)
        return value[start:stop]
    if isinstance(value, list | tuple):
        parts = [_part(part, low, high, total, cut) for part, cut in zip(value, cuts, strict=True)]
        return type(value)(parts)
    taken = {name: _part(part, low, high, total, cuts[name]) for name, part in (contents(value) or {}).items()}
    if isinstance(value, DiagonalGaussianDistribution):
        return DiagonalGaussianDistribution(taken["parameters"], value.deterministic)
    if isinstance(value, Cache | CacheLayerMixin):
        own = copy.copy(value)
        vars(own).update(taken)
        return own
    return type(value)(**taken) if isinstance(value, OrderedDict) else taken


def _bounds(length: int, low: int, high: int, total: int) -> tuple[int, int]:
    """Where the samples from `low` to `high` are, of something that has as many places for each."""
    if length % total:
        raise NotSplittableError("the joined result has not as many places for each sample")
    return low * (length // total), high * (length // total)

"""Several calls of one component as one call.

Nothing here knows a family. A call's arguments are taken apart into leaves; leaves with one row, or one element of a
list, per sample are put one after another, scalar tensors (timesteps) become one row per sample, and everything else
has to be equal. What that cannot know, whether the component treats samples independently, is verified by running both
ways once for each kind of call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


class NotJoinableError(Exception):
    """The calls do not fit together."""


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
        return sum(isinstance(trait, tuple) and trait[0] in ("rows", "scalar", "each") for trait in self.traits)


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
    rows = _rows((*args, *kwargs.values()))
    if rows == 0:
        return None
    leaves: list[Any] = []
    # Where one list has an element for each sample, lists without tensors may have that too.
    has_elements = any(_is_of_tensors(value) and _has_elements(value, rows) for value in (*args, *kwargs.values()))
    structure = _flatten((args, dict(kwargs)), rows if has_elements else 0, leaves)
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


def _same(column: Sequence[Any]) -> bool:
    first = column[0]
    if isinstance(first, torch.Tensor):
        return all(other.shape == first.shape and bool((other == first).all()) for other in column[1:])
    if isinstance(first, list):
        return all(len(other) == len(first) for other in column) and all(map(_same, zip(*column, strict=True)))
    return True


def _rows(values: tuple[Any, ...]) -> int:
    """How many samples a call is for: as many rows as its first tensor has, or as many elements as its lists of them.

    0 where it has neither.
    """
    tensors = list(_tensors(values, in_lists=False))
    for least in (2, 1):
        if rows := next((tensor.shape[0] for tensor in tensors if tensor.dim() >= least), 0):
            return rows
        if least == 2 and (rows := next((len(value) for value in values if _is_of_tensors(value)), 0)):
            return rows
    return 0


def _tensors(value: Any, *, in_lists: bool) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, in_lists=in_lists)
    elif isinstance(value, tuple) or (in_lists and isinstance(value, list)):
        for item in value:
            yield from _tensors(item, in_lists=in_lists)


def _is_of_tensors(value: Any) -> bool:
    return type(value) is list and any(True for _ in _tensors(value, in_lists=True))


def _has_elements(value: Any, rows: int) -> bool:
    """Whether a list has an element for each sample, unlike one of residuals, each of which has a row for each."""
    if type(value) is not list or len(value) != rows:
        return False
    return not all(isinstance(item, torch.Tensor) and item.dim() and item.shape[0] == rows for item in value)


def _flatten(value: Any, elements: int, leaves: list[Any]) -> Hashable:
    """`elements` is how many lists have that have one for each sample; 0 where there are none."""
    kind = type(value)
    if elements and _has_elements(value, elements):
        leaves.append(value)
        return None
    if kind is tuple or kind is list:
        return (kind, tuple(_flatten(item, elements, leaves) for item in value))
    if kind is dict:
        return (kind, tuple((name, _flatten(item, elements, leaves)) for name, item in value.items()))
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
    if type(leaf) is list:
        return "each", frozenset(map(_element, leaf))
    try:
        hash(leaf)
    except TypeError:
        return "object", id(leaf)
    return type(leaf), leaf


def _element(value: Any) -> Hashable:
    """What has to agree between elements of lists that have one for each sample: lengths may differ."""
    if isinstance(value, torch.Tensor):
        return value.dim(), value.dtype, value.device
    parts = frozenset(map(_element, value)) if isinstance(value, list) else None
    return type(value), parts


def _join_leaf(values: tuple[Any, ...], rows: Sequence[int]) -> Any:
    first = values[0]
    if isinstance(first, torch.Generator):
        # VAEs take one and most ignore it. One of its own: a call that draws from it is found to differ, and the
        # requests' generators stay where they are.
        return torch.Generator(first.device).set_state(first.get_state())
    if type(first) is list:
        return [element for value in values for element in value]
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

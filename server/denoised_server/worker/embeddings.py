"""What text encoders came to, kept for a while: the same prompt is often asked for again, with another seed.

A call is the same when component and arguments are, bit by bit. Only results of calls that ran alone are kept, so that
what is found is what computing it alone would give. Requests that have changed the component, or that forbid sharing,
have no part in it.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import exhaustion, splitting
from .seam import Method

PHASE = "text_encode"
# Of the arguments of a call, in bytes: more than tokens and masks need.
MAX_ARGUMENTS = 1 << 16
# A result that takes more than this share of the room would drive out too many others.
LARGEST = 0.25


@dataclass(frozen=True, slots=True)
class Found:
    """A result, the finder's own."""

    value: Any


@dataclass(frozen=True, slots=True)
class _Kept:
    module: weakref.ref[nn.Module]
    value: Any
    size: int
    expires: float


class Embeddings:
    """At most so many bytes, each for at most so many seconds; those that were not found for longest go first."""

    def __init__(self, max_bytes: int, ttl: float) -> None:
        self._max_bytes, self._ttl = max_bytes, ttl
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self.size_bytes = 0

    def key(self, method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        """Equal for calls that come to the same; None for a call of which nothing is kept."""
        if not self._max_bytes or not self._ttl or method.phase != PHASE:
            return None
        tensors = list(_tensors((args, kwargs)))
        if not tensors or sum(tensor.nbytes for tensor in tensors) > MAX_ARGUMENTS:
            return None
        content = _content((args, kwargs))
        return None if content is None else (id(method), content)

    def find(self, key: Hashable, method: Method, now: float) -> Found | None:
        kept = self._kept.get(key)
        if kept is None:
            return None
        # The number of a method that is gone may be another's by now.
        if kept.module() is not method.module or now >= kept.expires:
            self._drop(key)
            return None
        self._kept.move_to_end(key)
        # A pipeline may work on it in place.
        return self._copied(kept.value)

    def keep(self, key: Hashable, method: Method, value: Any, now: float) -> None:
        storages = [tensor.untyped_storage() for tensor in _tensors(value)]
        size = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        if key in self._kept:
            self._drop(key)
        for other in [other for other, kept in self._kept.items() if now >= kept.expires or kept.module() is None]:
            self._drop(other)
        if size > self._max_bytes * LARGEST:
            return
        while self.size_bytes + size > self._max_bytes:
            self._drop(next(iter(self._kept)))
        if (copied := self._copied(value)) is not None:
            self._kept[key] = _Kept(weakref.ref(method.module), copied.value, size, now + self._ttl)
            self.size_bytes += size

    def clear(self) -> None:
        """Its room is wanted for other things."""
        self._kept.clear()
        self.size_bytes = 0

    def _copied(self, value: Any) -> Found | None:
        """None where there is no memory for it: then it is none for keeping others either."""
        try:
            return Found(copy.deepcopy(value))
        except Exception as error:
            if not exhaustion.is_out_of_memory(error):
                raise
        self.clear()
        return None

    def _drop(self, key: Hashable) -> None:
        self.size_bytes -= self._kept.pop(key).size


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif (parts := splitting.contents(value)) is not None:
        for item in parts.values():
            yield from _tensors(item)


def _content(value: Any) -> Hashable:
    """None for what has something in it that is neither plain nor a tensor."""
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return value.dtype, value.shape, value.device, data.numpy().tobytes()
    if type(value) in (list, tuple, dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        found = [(name, _content(item)) for name, item in items]
        return None if any(content is None for _, content in found) else (type(value), tuple(found))
    return (type(value), value) if isinstance(value, bool | int | float | str | None) else None

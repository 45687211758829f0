"""Weights that can be read again from the files that they came from.

Libraries rename and convert what they read, so names prove little. Before weights are let go of for the first time,
each is compared with what is in the files, bit by bit. What is not there, such as tables that a module computes for
itself, stays; where that is much, all of it does.
"""

from __future__ import annotations

import json
import logging
import os
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from denoised.errors import WeightsChangedError

from .cargo import Cargo, Slot
from .digests import Digests

logger = logging.getLogger(__name__)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Share of a component that may stay when the rest leaves.
STAYING = 0.05
# Of many tensors of one size, most differ in their first elements.
GLANCE = 64


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor is in a file."""

    path: Path
    name: str
    offset: int
    size: int
    dtype: torch.dtype

    @property
    def count(self) -> int:
        return self.size // self.dtype.itemsize

    def read(self, count: int) -> torch.Tensor:
        """Its first elements."""
        raw = torch.empty(count * self.dtype.itemsize, dtype=torch.uint8)
        _read(self.path, self.offset, raw)
        return raw.view(self.dtype)


class Reread:
    """The files of one component, and where in them each of its tensors is."""

    def __init__(self, places: Sequence[tuple[Slot, _Place]], digests: Digests) -> None:
        self._places, self._digests = places, digests
        self._contents = {path: digests.of_file(path) for path in {place.path for _, place in places}}

    @classmethod
    def of(cls, cargo: Cargo, files: Sequence[Path], digests: Digests) -> Reread | None:
        """Leaves what is not in the files as it is out of the cargo; None when that is much of it."""
        if not files or any(path.suffix != ".safetensors" for path in files):
            return None
        try:
            by_count: dict[int, list[_Place]] = defaultdict(list)
            for path in files:
                for place in _places(path):
                    by_count[place.count].append(place)
            found = [_find(slot, by_count[slot.tensor.numel()]) for slot in cargo.slots]
            missing = [slot for slot, place in zip(cargo.slots, found, strict=True) if place is None]
            if sum(slot.size for slot in missing) > STAYING * cargo.size:
                logger.debug("%s and %d others are not in the files", missing[0].names[0], len(missing) - 1)
                return None
            cargo.leave_out(missing)
            return cls(list(zip(cargo.slots, filter(None, found), strict=True)), digests)
        except (OSError, ValueError, KeyError, struct.error):
            logger.debug("weight files cannot be read again", exc_info=True)
            return None

    def fill(self, buffer: torch.Tensor) -> None:
        """Reads the weights into a buffer in the host's memory. Raises WeightsChangedError."""
        try:
            for path, content in self._contents.items():
                if self._digests.of_file(path) != content:
                    raise _changed(path)
            for slot, place in self._places:
                view = slot.view(buffer)
                if place.dtype == slot.dtype and view.is_contiguous():
                    _read(place.path, place.offset, buffer[slot.offset : slot.offset + slot.size])
                else:
                    view.copy_(place.read(place.count).view(slot.shape))
        except OSError as error:
            raise _changed(Path(str(error.filename or "weights"))) from None


def _places(path: Path) -> Iterator[_Place]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: Mapping[str, Mapping[str, object]] = json.loads(file.read(length))
    for name, entry in header.items():
        offsets = entry.get("data_offsets")
        if isinstance(offsets, list) and (dtype := DTYPES.get(str(entry.get("dtype")))) is not None:
            begin, end = offsets
            yield _Place(path, name, 8 + length + begin, end - begin, dtype)


def _find(slot: Slot, candidates: list[_Place]) -> _Place | None:
    """The place whose content is the slot's, likely ones first."""
    flat = slot.tensor.detach().cpu().reshape(-1)
    for place in sorted(candidates, key=lambda place: -_likeness(place.name, slot.names)):
        if all(_is_same(place.read(count), flat[:count]) for count in (min(GLANCE, place.count), place.count)):
            return place
    return None


def _likeness(name: str, names: Sequence[str]) -> int:
    """How much of the ends of two names is the same."""
    ends = ([a == b for a, b in zip(reversed(name), reversed(other), strict=False)] for other in names)
    return max(same.index(False) if False in same else len(same) for same in ends)


def _is_same(stored: torch.Tensor, held: torch.Tensor) -> bool:
    return torch.equal(stored.to(held.dtype).view(torch.uint8), held.contiguous().view(torch.uint8))


def _read(path: Path, offset: int, into: torch.Tensor) -> None:
    # Not by memory map: a file that somebody truncates would take the process down.
    view = memoryview(cast(Any, into.numpy()))
    with path.open("rb", buffering=0) as file:
        while view:
            count = os.preadv(file.fileno(), [view], offset)
            if not count:
                raise _changed(path)
            view, offset = view[count:], offset + count


def _changed(path: Path) -> WeightsChangedError:
    return WeightsChangedError(
        f"The weight file {path.parent.name}/{path.name} is not what it was when it was loaded.",
        hint="Load the pipeline again.",
    )

"""The weights of one component as what can be moved: many tensors that leave and come back together.

They come back in one buffer, so that memory is taken and given back in one piece and a copy to a device is one copy.
The tensor objects stay the same through all of it: weights that are tied stay tied, and twins of a module see the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from . import mapped, tensors

# Where each tensor of a buffer begins: where torch's allocators would have it begin, so that kernels go the same way.
ALIGNMENT = {"cpu": 64, "cuda": 512}
# Smaller tensors stay: they cost nothing, and pipelines read some of them outside of calls.
SMALL_BYTES = 256


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One tensor, and its place in the buffer."""

    tensor: torch.Tensor
    names: tuple[str, ...]
    offset: int
    size: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        place = buffer[self.offset : self.offset + self.size].view(self.dtype)
        return place.as_strided(self.shape, self.stride, place.storage_offset())


class Cargo:
    """The tensors of a component that can leave the device. What shares its memory with others stays.

    `without` are tensors that are another component's.
    """

    def __init__(self, module: nn.Module, device: torch.device, *, without: Iterable[torch.Tensor] = ()) -> None:
        self._device = device
        names: dict[int, list[str]] = {}
        for listed in (module.named_parameters, module.named_buffers):
            for name, tensor in listed(remove_duplicate=False):
                for part in tensors.plain(tensor):
                    names.setdefault(id(part), []).append(name)
        theirs = {id(tensor) for tensor in without}
        found = [tensor for tensor in tensors.of(module) if id(tensor) not in theirs]
        overlapping = _overlapping(found)
        self.slots: list[Slot] = []
        self.size = self.buffer_bytes = 0
        # What the tensors are parts of at the moment, once they are.
        self._buffer: torch.Tensor | None = None
        for tensor in found:
            size = tensor.numel() * tensor.itemsize
            is_alone = id(tensor) not in overlapping and _is_dense(tensor)
            if is_alone and size > SMALL_BYTES and type(tensor) in (torch.Tensor, nn.Parameter):
                named = tuple(names[id(tensor)])
                self._append(Slot(tensor, named, 0, size, tensor.shape, tensor.stride(), tensor.dtype))
        slotted = {id(slot.tensor) for slot in self.slots}
        self._others = [tensor for tensor in found if id(tensor) not in slotted]
        self.other_bytes = sum({each.data_ptr(): each.numel() * each.itemsize for each in self._others}.values())

    def _append(self, slot: Slot) -> None:
        alignment = ALIGNMENT[self._device.type]
        self.slots.append(replace(slot, offset=self.buffer_bytes))
        self.size += slot.size
        self.buffer_bytes += -(-slot.size // alignment) * alignment

    def leave_out(self, stays: Collection[Slot]) -> None:
        """These stay on the device; to be said before the others leave for the first time."""
        for slot in stays:
            # Out of the buffer, which would stay with them.
            slot.tensor.data = slot.tensor.data.clone()
            self.slots.remove(slot)
            self.size -= slot.size

    def own(self) -> None:
        """Copies the weights out of where they were read to, in the host's memory.

        safetensors maps the file: weights would change with it, or take the process down when it is truncated.
        """
        self.come_back(self.pack(pinned=False))
        self.own_others()

    def own_others(self) -> None:
        """The same for what stays when the others leave."""
        for tensor in self._others:
            tensor.data = tensor.data.clone()

    @property
    def is_packed(self) -> bool:
        """Whether the weights are in one buffer."""
        return self._buffer is not None

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [slot.tensor for slot in self.slots]

    def empty(self, *, pinned: bool) -> torch.Tensor:
        """A buffer in the host's memory that takes all of them."""
        if pinned:
            return torch.empty(self.buffer_bytes, dtype=torch.uint8, pin_memory=True)
        return mapped.empty(self.buffer_bytes)

    def pack(self, *, pinned: bool) -> torch.Tensor:
        """The weights in one buffer in the host's memory; the tensors stay as they are."""
        if self._buffer is not None and self._buffer.device.type == "cpu":
            return self._buffer
        buffer = self.empty(pinned=pinned)
        for _ in self.fill(buffer):
            pass
        return buffer

    def fill(self, buffer: torch.Tensor) -> Iterator[None]:
        """Copies the weights into a buffer, one after another: whoever has to may leave between two."""
        # Those of now: others may be left out meanwhile, and then stay as they are.
        for slot in tuple(self.slots):
            slot.view(buffer).copy_(slot.tensor.data)
            yield

    def unload(self) -> list[tuple[StorageWeakRef, int]]:
        """Lets go of the weights. Returns what shows which memory is really free, with its bytes."""
        let_go: dict[int, tuple[StorageWeakRef, int]] = {}
        # All of them first: there may be no memory for one, and half a component is worth nothing.
        stand_ins = {slot.dtype: _stand_in(slot.dtype, self._device) for slot in self.slots}
        for slot in self.slots:
            storage = slot.tensor.untyped_storage()
            let_go.setdefault(storage.data_ptr(), (StorageWeakRef(storage), storage.nbytes()))
            slot.tensor.data = stand_ins[slot.dtype].expand(slot.shape)
        self._buffer = None
        return list(let_go.values())

    def come_back(self, buffer: torch.Tensor) -> None:
        """The weights are in this buffer, on the device."""
        for slot in self.slots:
            slot.tensor.data = slot.view(buffer)
        self._buffer = buffer


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill one stretch of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _overlapping(found: list[torch.Tensor]) -> set[int]:
    """Tensors that have memory in common with others, by id."""
    overlapping: set[int] = set()
    end, before = -1, None
    for tensor in sorted(found, key=torch.Tensor.data_ptr):
        extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        if before is not None and tensor.data_ptr() < end:
            overlapping |= {id(before), id(tensor)}
        if tensor.numel() and (reach := tensor.data_ptr() + extent * tensor.itemsize) > end:
            end, before = reach, tensor
    return overlapping


def _stand_in(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One element that is no number: should something compute with it after all, that shows."""
    return torch.full((dtype.itemsize,), 0xFF, dtype=torch.uint8, device=device).view(dtype).reshape(())

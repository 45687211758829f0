"""What a device's memory holds, as its allocator and the machine say."""

from __future__ import annotations

import ctypes

import psutil
import torch

from . import mapped

# Of glibc's struct mallinfo2.
_FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


class DeviceMemory:
    """The memory of one device; on the CPU, of this process and of the machine."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self._mallinfo = None if device.type == "cuda" else getattr(ctypes.CDLL(None), "mallinfo2", None)
        if self._mallinfo is not None:
            self._mallinfo.restype = _MallInfo

    @property
    def total_bytes(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.get_device_properties(self._device).total_memory)
        return int(psutil.virtual_memory().total)

    @property
    def free_bytes(self) -> int:
        """What nobody uses, other programs included."""
        if self._device.type == "cuda":
            return int(torch.cuda.mem_get_info(self._device)[0])
        return int(psutil.virtual_memory().available)

    @property
    def process_bytes(self) -> int:
        """What the allocator holds on a GPU; the resident set on the CPU."""
        if self._device.type == "cuda":
            return int(torch.cuda.memory_reserved(self._device))
        return int(self._process.memory_info().rss)

    @property
    def allocated_bytes(self) -> int:
        """What is in use: by tensors on a GPU; on the CPU by all that is mapped for weights or came from malloc, where
        that can be asked.
        """
        if self._device.type == "cuda":
            return int(torch.cuda.memory_allocated(self._device))
        if self._mallinfo is None:
            return self.process_bytes
        info = self._mallinfo()
        return int(info.uordblks + info.hblkhd) + mapped.size_bytes()

    @property
    def cached_bytes(self) -> int:
        """What was freed and the allocator keeps."""
        if self._device.type == "cuda":
            return self.process_bytes - self.allocated_bytes
        return int(self._mallinfo().fordblks) if self._mallinfo is not None else 0

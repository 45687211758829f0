"""Who can make room on the device."""

from __future__ import annotations

from typing import Protocol

from torch import nn


class Room(Protocol):
    """Each method says how many bytes came free. For the engine's thread."""

    def evict_idle(self, needed_bytes: int, reason: str = "out_of_memory") -> int:
        """Moves off what nobody uses, until so many bytes are free."""
        ...

    def offload(self, keep: nn.Module) -> int:
        """Moves off everything but this component, also what others will bring back for their next call."""
        ...

"""Bytes on a device: who was promised what.

Weights are planned from file headers before a byte is read, reserved while a load runs, and settled with what was
measured. At every moment weights + reserved ≤ budget held when the last reservation was made; settling a load that
measured more than it planned may pass the budget by that difference, because the bytes are there.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from denoised.errors import NeverFitsError, NoRoomError


@dataclass(frozen=True, slots=True)
class Plan:
    """What a load would take: bytes by digest of what is not held yet, and bytes that are there already."""

    new: Mapping[str, int]
    shared_bytes: int

    @property
    def new_bytes(self) -> int:
        return sum(self.new.values())


class Ledger:
    """Accounts of one device. Knows digests and sizes, nothing of modules."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._weights: dict[str, int] = {}
        self._reserved: dict[int, int] = {}
        self._numbers = itertools.count(1)

    @property
    def weight_bytes(self) -> int:
        return sum(list(self._weights.values()))  # a copy: other threads read this

    @property
    def reserved_bytes(self) -> int:
        return sum(list(self._reserved.values()))

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - self.weight_bytes - self.reserved_bytes

    def plan(self, components: Mapping[str, int]) -> Plan:
        """What loading these components, bytes by digest, would take. Raises NeverFitsError or NoRoomError."""
        new = {digest: size for digest, size in components.items() if digest not in self._weights}
        plan = Plan(new, sum(size for digest, size in components.items() if digest not in new))
        needed, total = plan.new_bytes, sum(components.values())
        figures = {
            "needed_bytes": str(needed),
            "free_bytes": str(max(0, self.free_bytes)),
            "budget_bytes": str(self.budget_bytes),
        }
        if total > self.budget_bytes:
            raise NeverFitsError(
                f"The weights take {total:,} bytes and the device's budget is {self.budget_bytes:,}.",
                hint="Load with a smaller dtype, or give the daemon a larger memory_budget.",
                metadata=figures,
            )
        if needed > self.free_bytes:
            raise NoRoomError(
                f"The weights take {needed:,} bytes and {max(0, self.free_bytes):,} are free.",
                hint="Unload a pipeline that is not needed, or try again when one has expired.",
                retry_after=10.0,
                metadata=figures,
            )
        return plan

    def reserve(self, plan: Plan) -> int:
        """Promises the plan's new bytes; returns the number of the reservation."""
        number = next(self._numbers)
        self._reserved[number] = plan.new_bytes
        return number

    def settle(self, reservation: int, measured: Mapping[str, int]) -> None:
        """The load is done: these components, bytes by digest, are held now."""
        self.cancel(reservation)
        self._weights |= measured

    def cancel(self, reservation: int) -> None:
        """The load failed: its promise is taken back."""
        self._reserved.pop(reservation, None)

    def resize(self, digest: str, size: int) -> None:
        """The component has so many bytes on the device from now on: it has left, all but a little, or is back."""
        self._weights[digest] = size

    def release(self, digest: str) -> int:
        """The component is gone; returns its bytes."""
        return self._weights.pop(digest, 0)

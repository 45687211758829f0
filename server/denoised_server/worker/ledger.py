"""Bytes on a device: who was promised what.

Memory is divided into what weights may take (the budget), what computing is sure of beside them (the working set), and
what nobody is promised (the headroom). Weights are planned from file headers before a byte is read, reserved while a
load runs, and settled with what was measured. At every moment weights + reserved + lent + free = budget, where lent is
what calls took of the weights' room because the working set's own was not enough. Nothing is ever promised beyond that;
settling a load that measured more than it planned may pass the budget by the difference, because the bytes are there.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from denoised.errors import NeverFitsError, NoRoomError

# When a caller who found no room may try again. Seconds.
RETRY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a load would take: bytes by digest of what is not held yet, bytes that are there already, and how many bytes
    of what is idle have to go first.
    """

    new: Mapping[str, int]
    shared_bytes: int
    lacking_bytes: int = 0

    @property
    def new_bytes(self) -> int:
        return sum(self.new.values())


class Ledger:
    """Accounts of one device. Knows digests and sizes, nothing of modules."""

    def __init__(self, budget_bytes: int, working_set_bytes: int = 0, headroom_bytes: int = 0) -> None:
        self.budget_bytes = budget_bytes
        self.working_set_bytes = working_set_bytes
        self.headroom_bytes = headroom_bytes
        self._weights: dict[str, int] = {}
        self._reserved: dict[int, int] = {}
        self._working: dict[int, int] = {}
        self._numbers = itertools.count(1)

    @classmethod
    def of_device(
        cls, total: int, *, weights: int | float | None, working_set: int | float, headroom: int | float, part: float
    ) -> Ledger:
        """Divides a device's bytes, floats being shares of them; `weights` of None get what the others leave of `part`.

        What is left over is the working set's too.
        """
        kept, spared = _bytes(working_set, total), _bytes(headroom, total)
        left = max(0, int(total * part) - spared)
        budget = max(0, left - kept) if weights is None else _bytes(weights, total)
        return cls(budget, max(kept, left - budget), spared)

    @property
    def weight_bytes(self) -> int:
        return sum(list(self._weights.values()))  # a copy: other threads read this

    @property
    def reserved_bytes(self) -> int:
        return sum(list(self._reserved.values()))

    @property
    def claimed_bytes(self) -> int:
        """What running calls were promised."""
        return sum(list(self._working.values()))

    @property
    def lent_bytes(self) -> int:
        """What of the weights' room calls have."""
        return max(0, self.claimed_bytes - self.working_set_bytes)

    @property
    def free_bytes(self) -> int:
        """What weights may still take."""
        return self.budget_bytes - self.weight_bytes - self.reserved_bytes - self.lent_bytes

    @property
    def working_room_bytes(self) -> int:
        """What one more call may take: what is left of the working set, and room that weights do not use."""
        room = self.budget_bytes - self.weight_bytes - self.reserved_bytes
        return max(0, self.working_set_bytes + max(0, room) - self.claimed_bytes)

    def __contains__(self, digest: str) -> bool:
        return digest in self._weights

    def plan(self, components: Mapping[str, int], evictable_bytes: int = 0) -> Plan:
        """What loading these components, bytes by digest, would take; nothing is promised yet.

        `evictable_bytes` are of others, which are idle and may go. Raises NeverFitsError for what the empty device
        could not hold, and NoRoomError for what it cannot hold beside what has to stay.
        """
        new = {digest: size for digest, size in components.items() if digest not in self._weights}
        needed, total, free = sum(new.values()), sum(components.values()), max(0, self.free_bytes)
        if total > self.budget_bytes:
            raise NeverFitsError(
                f"The weights take {total:,} bytes and the device's budget is {self.budget_bytes:,}.",
                hint="Load with a smaller dtype, or give the daemon a larger memory_budget.",
                metadata=self._figures(total, evictable_bytes),
            )
        if needed > free + evictable_bytes:
            raise self._no_room(needed, evictable_bytes)
        return Plan(new, total - needed, max(0, needed - free))

    def reserve(self, plan: Plan) -> int:
        """Promises the plan's new bytes; returns the number of the reservation.

        Raises NoRoomError when what was free then is not free any more, or what has to go is still there.
        """
        if plan.new_bytes > max(0, self.free_bytes):
            raise self._no_room(plan.new_bytes, 0)
        number = next(self._numbers)
        self._reserved[number] = plan.new_bytes
        return number

    def extend(self, reservation: int, size: int) -> None:
        """Promises the same load so many bytes more. Raises NoRoomError when they are not free."""
        if size > max(0, self.free_bytes):
            raise self._no_room(size, 0)
        self._reserved[reservation] += size

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

    def claim(self, size: int) -> int:
        """Promises a call what it works in; returns the number of the claim. Raises NoRoomError.

        Weights are not loaded into it until it is given back.
        """
        if size > self.working_room_bytes:
            raise NoRoomError(
                f"The call works in {size:,} bytes and {self.working_room_bytes:,} are free.",
                hint="Ask for a smaller picture or fewer at a time, or unload a pipeline that is not needed.",
                retry_after=RETRY_SECONDS,
                metadata=self._figures(size, 0) | {"free_bytes": str(self.working_room_bytes)},
            )
        number = next(self._numbers)
        self._working[number] = size
        return number

    def claim_rest(self, size: int) -> int:
        """Promises as much of it as there is."""
        number = next(self._numbers)
        self._working[number] = min(size, self.working_room_bytes)
        return number

    def give_back(self, claim: int) -> None:
        """The call is over."""
        self._working.pop(claim, None)

    def _no_room(self, needed: int, evictable: int) -> NoRoomError:
        free = max(0, self.free_bytes)
        idle = f", and {evictable:,} more are held by what is idle" if evictable else ""
        return NoRoomError(
            f"The weights take {needed:,} bytes and {free:,} are free{idle}.",
            hint="Unload a pipeline that is not needed, or try again when one has expired.",
            retry_after=RETRY_SECONDS,
            metadata=self._figures(needed, evictable),
        )

    def _figures(self, needed: int, evictable: int) -> dict[str, str]:
        sizes = {"needed": needed, "free": max(0, self.free_bytes), "evictable": evictable, "budget": self.budget_bytes}
        return {f"{name}_bytes": str(size) for name, size in sizes.items()}


def _bytes(setting: int | float, total: int) -> int:
    return int(setting * total) if isinstance(setting, float) else setting

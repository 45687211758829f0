"""Moves the weights of one component between device, host and disk. Whether to is decided elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from . import absence
from .components import Held
from .digests import Digests
from .memory_counts import MemoryCounts
from .reclaim import Reclaim
from .reread import Reread
from .tiers import Bandwidths, Tier


class Mover:
    """Does one move at a time for each component. `bring` is called, from any thread, by who uses what is away."""

    def __init__(
        self,
        device: torch.device,
        digests: Digests,
        bandwidths: Bandwidths,
        counts: MemoryCounts,
        bring: Callable[[Held], None],
    ) -> None:
        self._device, self._digests, self._bring = device, digests, bring
        self._bandwidths, self._counts = bandwidths, counts
        self.reclaim = Reclaim()

    def can_leave(self, held: Held, *, to_host: bool) -> bool:
        """Whether there is a place to bring it back from; compares it with its files the first time."""
        if held.reread is None and held.can_reread:
            held.reread = Reread.of(held.cargo, held.files, self._digests)
            held.can_reread = held.reread is not None
        return bool(held.cargo.slots) and (to_host or held.can_reread)

    def prepare(self, held: Held, *, to_host: bool) -> None:
        """Does what takes long of leaving; the component may be used meanwhile."""
        if to_host and held.host is None:
            held.host = held.cargo.pack(pinned=self._device.type == "cuda")

    def leave(self, held: Held, *, to_host: bool) -> Callable[[], None]:
        """The component leaves the device, for the host's memory or for good. Nobody may be using it.

        Returns what is left to do: to see to it that its memory comes free.
        """
        absence.begin(list(held.shells), held.cargo.tensors, partial(self._bring, held))
        let_go = held.cargo.unload()
        held.host = held.host if to_host else None
        held.tier = Tier.HOST if to_host else Tier.DISK
        if held.host is not None:
            kept = held.host.untyped_storage()._cdata
            let_go = [(ref, size) for ref, size in let_go if ref.cdata != kept]
        return partial(self.reclaim.settle, type(held.module).__name__, let_go)

    def drop_copy(self, held: Held) -> None:
        """The host's memory is wanted; what was only there is only on disk from now on."""
        held.host = None
        if held.tier is Tier.HOST:
            held.tier = Tier.DISK

    def come(self, held: Held) -> None:
        """The component comes back to the device. Raises WeightsChangedError."""
        tier, began = held.tier, time.perf_counter()
        buffer = held.host
        if buffer is None:
            assert held.reread is not None, "what cannot be read again does not leave"
            buffer = held.cargo.empty(pinned=self._device.type == "cuda")
            held.reread.fill(buffer)
        if self._device.type == "cpu":
            # The host's memory is the device's.
            held.host = None
        else:
            buffer = buffer.to(self._device)
        held.cargo.come_back(buffer)
        absence.end(list(held.shells))
        held.tier = Tier.DEVICE
        seconds = time.perf_counter() - began
        self._bandwidths.learn(tier, held.cargo.size, seconds)
        self._counts.arrived(tier, held.cargo.size, seconds)

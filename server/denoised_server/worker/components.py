"""The component store: one nn.Module per content, and who uses it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from denoised_server.messages import HeldComponent
from torch import nn

from . import seam
from .cargo import Cargo
from .eviction import Uses
from .reread import Reread
from .tiers import Tier


@dataclass(slots=True, eq=False)
class Held:
    """One component. `digest` is the identity of its content, `tier` says where its weights are.

    `files` are what it was read from; empty where that does not say all. `cargo` are the weights that can leave;
    `device_bytes` are those on the device at the moment, as the ledger has them: all of `weight_bytes` while it is
    there, and else what never leaves. `shells` are the modules that have its weights: itself, and its twins.

    Who moves it keeps the rest: whether it `is_moving`, how many calls claim it and how many of them run, what of it is
    in the host's memory, and how it can be read again, which is looked into when it has to leave.
    """

    digest: str
    module: nn.Module
    weight_bytes: int
    cargo: Cargo
    uses: Uses
    users: frozenset[str] = frozenset()
    files: tuple[Path, ...] = ()
    tier: Tier = Tier.DEVICE
    is_moving: bool = False
    claims: int = 0
    running: int = 0
    host: torch.Tensor | None = None
    reread: Reread | None = None
    can_reread: bool = True
    shells: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)

    @property
    def device_bytes(self) -> int:
        return self.weight_bytes if self.tier is Tier.DEVICE else self.weight_bytes - self.cargo.size


def dtype_name(module: nn.Module) -> str:
    """Element type of the first floating-point weight, as torch names it; empty without one."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return str(parameter.dtype).removeprefix("torch.")
    return ""


class ComponentStore:
    """Owns every component of the worker. A component stays while a pipeline uses it."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}
        self._lock = threading.Lock()

    def acquire(self, digest: str, user: str) -> nn.Module | None:
        """The component of this content, used by one more pipeline; None when it is not held."""
        with self._lock:
            held = self._held.get(digest)
            if held is None:
                return None
            held.users |= {user}
            return held.module

    def add(self, held: Held) -> None:
        seam.watch(held.module)
        with self._lock:
            self._held[held.digest] = held

    def get(self, digest: str) -> Held | None:
        with self._lock:
            return self._held.get(digest)

    def all(self) -> list[Held]:
        with self._lock:
            return list(self._held.values())

    def find(self, module: nn.Module) -> Held | None:
        with self._lock:
            return next((held for held in self._held.values() if held.module is module), None)

    def release(self, user: str, keep: Iterable[nn.Module] = ()) -> list[Held]:
        """The pipeline is gone, all but what is to keep; returns the components that nobody uses any more."""
        gone, kept = [], {id(module) for module in keep}
        with self._lock:
            for digest, held in list(self._held.items()):
                if id(held.module) not in kept:
                    held.users -= {user}
                if not held.users:
                    gone.append(self._held.pop(digest))
        return gone

    def leave(self, digest: str, user: str) -> Held | None:
        """The pipeline does without this component from now on; returns it when it is gone, because nobody uses it."""
        with self._lock:
            held = self._held.get(digest)
            if held is not None:
                held.users -= {user}
            return self._held.pop(digest) if held is not None and not held.users else None

    def drop(self, digest: str) -> Held | None:
        """Lets go of a component that pipelines have used and can do without; None when it is not held."""
        with self._lock:
            return self._held.pop(digest, None)

    def __contains__(self, digest: str) -> bool:
        return digest in self._held

    def snapshot(self) -> tuple[HeldComponent, ...]:
        with self._lock:
            return tuple(
                HeldComponent(
                    held.digest, type(held.module).__name__, held.weight_bytes, tuple(sorted(held.users)), held.tier
                )
                for held in self._held.values()
            )

    def share(self, modules: Iterable[nn.Module], user: str) -> None:
        """One more pipeline uses these components."""
        wanted = {id(module) for module in modules}
        with self._lock:
            for held in self._held.values():
                if id(held.module) in wanted:
                    held.users |= {user}

"""The component store: one nn.Module per content, and who uses it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from denoised_server.messages import HeldComponent
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import seam
from .tiers import Tier


@dataclass(slots=True, eq=False)
class Held:
    """One component. `digest` is the identity of its content, `tier` says where its weights are.

    `device_bytes` are those on the device at the moment, as the ledger has them: all of `weight_bytes` while it is
    there, and else the few small tensors that never leave.
    """

    digest: str
    module: nn.Module
    weight_bytes: int
    users: set[str] = field(default_factory=set)
    tier: Tier = Tier.DEVICE
    device_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.device_bytes = self.weight_bytes


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the module's distinct storages: tied and viewed weights count once."""
    tensors = [plain for each in (*module.parameters(), *module.buffers()) for plain in _plain(each)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def is_wrapped(module: nn.Module) -> bool:
    """Whether some of its weights have no storage of their own, as quanto's and torchao's have none."""
    return any(is_traceable_wrapper_subclass(parameter) for parameter in module.parameters())


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """What holds its numbers: quantised weights are made of several tensors and have no storage of their own."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))


def dtype_name(module: nn.Module) -> str:
    """Element type of the first floating-point weight, as torch names it; empty without one."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return str(parameter.dtype).removeprefix("torch.")
    return ""


def to_device(module: nn.Module, device: torch.device) -> None:
    if device.type == "cpu":
        # safetensors maps the file: weights would change with it, or take the process down when it is truncated.
        module._apply(torch.clone)
    else:
        module.to(device)


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
            held.users.add(user)
            return held.module

    def add(self, digest: str, module: nn.Module, user: str) -> Held:
        with self._lock:
            seam.watch(module)
            held = self._held[digest] = Held(digest, module, weight_bytes(module), {user})
            return held

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
                    held.users.discard(user)
                if not held.users:
                    gone.append(self._held.pop(digest))
        return gone

    def leave(self, digest: str, user: str) -> bool:
        """The pipeline does without this component from now on; says whether it is gone, because nobody uses it."""
        with self._lock:
            held = self._held.get(digest)
            if held is not None:
                held.users.discard(user)
                if not held.users:
                    del self._held[digest]
            return held is not None and not held.users

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
                    held.users.add(user)

"""Modules whose weights are away: whoever asks for one has it brought back first, and never computes with garbage.

Pipelines use components outside of calls too: they read statistics of a VAE, or call a layer of a transformer. While
weights are away the module's tables of them are replaced by ones that notice who takes a weight out. Looking at all of
them, as `module.dtype` does, is no use of any: what stands in has the shape, the type and the device of what is away.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn

from .tensors import plain

TABLES = ("_parameters", "_buffers")
# Methods of nn.Module that go over the tables with more in mind than looking.
USES = ("_apply", "_save_to_state_dict", "_load_from_state_dict")


class _Away(dict[str, Any]):
    """One table of a module, some of whose tensors are away."""

    def __init__(self, entries: dict[str, Any], missing: frozenset[str], bring: Callable[[], None]) -> None:
        super().__init__(entries)
        self.missing, self.bring = missing, bring

    def __getitem__(self, name: str) -> Any:
        if name in self.missing:
            self.bring()
        return super().__getitem__(name)


def begin(shells: Iterable[nn.Module], tensors: Collection[torch.Tensor], bring: Callable[[], None]) -> None:
    """These tensors are about to leave; `bring` returns when they are back. Shells are all modules that have them."""
    away = {id(tensor) for tensor in tensors}
    for shell in shells:
        for part in shell.modules():
            for table in TABLES:
                entries = vars(part)[table]
                missing = {name for name, entry in entries.items() if entry is not None and _is_among(entry, away)}
                if missing:
                    vars(part)[table] = _Away(entries, frozenset(missing), bring)


def end(shells: Iterable[nn.Module]) -> None:
    """They are back."""
    for shell in shells:
        for part in shell.modules():
            for table in TABLES:
                if isinstance(entries := vars(part)[table], _Away):
                    vars(part)[table] = dict(entries)


def install() -> None:
    """Makes casting, moving, saving and filling a module bring back its weights first; once for the process."""
    if getattr(nn.Module, "_denoised_absence", False):
        return
    nn.Module._denoised_absence = True  # type: ignore[attr-defined]
    for name in USES:
        setattr(nn.Module, name, _bringing(getattr(nn.Module, name)))


def _bringing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def bringing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for table in TABLES:
            if isinstance(entries := self.__dict__.get(table), _Away):
                entries.bring()
        return original(self, *args, **kwargs)

    return bringing


def _is_among(entry: torch.Tensor, tensors: set[int]) -> bool:
    return any(id(tensor) in tensors for tensor in plain(entry))

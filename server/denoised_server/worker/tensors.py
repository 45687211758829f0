"""What holds the numbers of a module."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def of(module: nn.Module) -> list[torch.Tensor]:
    """The module's weights and buffers, each once however many names it has."""
    found = (part for each in (*module.parameters(), *module.buffers()) for part in plain(each))
    return list({id(tensor): tensor for tensor in found}.values())


def plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Quantised weights are made of several tensors and have no storage of their own, as quanto's and torchao's."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain(getattr(tensor, name))

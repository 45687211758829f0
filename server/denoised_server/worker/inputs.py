"""What a component call is given, as far as its memory and running it again are concerned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Inputs:
    """The tensors and generators among the arguments of a call, and how they were before it.

    `rows` is the number of samples of one call, `row_bytes` the size of each, in all arguments together; the values may
    be those of several calls.
    """

    def __init__(self, values: Iterable[Any], *, calls: int = 1) -> None:
        self._calls = calls
        self.tensors: list[torch.Tensor] = []
        self._states: list[tuple[torch.Generator, torch.Tensor]] = []
        self._find(values)
        self.rows = next((tensor.shape[0] for tensor in self.tensors if tensor.dim() >= 2), 1)
        self._versions = [tensor._version for tensor in self.tensors]

    @property
    def row_bytes(self) -> int:
        rows = max(self.rows, 1)
        return sum(tensor.nbytes for tensor in self.tensors if tensor.dim() and tensor.shape[0] == rows) // (
            rows * self._calls
        )

    @property
    def dtype(self) -> str:
        """Element type of the first tensor of floating-point numbers."""
        found = (str(tensor.dtype) for tensor in self.tensors if tensor.is_floating_point())
        return next(found, "").removeprefix("torch.")

    @property
    def side(self) -> int:
        """The longer side of the first picture, in its pixels; 0 without one."""
        return next((max(tensor.shape[-2:]) for tensor in self.tensors if tensor.dim() >= 4), 0)

    def restore(self) -> bool:
        """Makes them what they were before the call; says whether they are: tensors changed in place stay changed."""
        for generator, state in self._states:
            generator.set_state(state)
        return all(tensor._version == version for tensor, version in zip(self.tensors, self._versions, strict=True))

    def _find(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):
                self.tensors.append(value)
            elif isinstance(value, (list, tuple)):
                self._find(value)
            elif isinstance(value, dict):
                self._find(value.values())
            # Not by isinstance, which takes torch as long as all of the above.
            elif type(value) is torch.Generator:
                self._states.append((value, value.get_state()))

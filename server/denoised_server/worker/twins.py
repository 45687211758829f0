"""A twin of a module: a tree of its own over the very same weights.

Diffusers' adapters rebuild the module that they are loaded into: layers are wrapped, processors replaced, embeddings
resized. Done to a component that others share, it would be done to them too. A twin can be rebuilt instead: it costs
Python objects and no bytes of weights, and the component never learns of it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from . import seam, tensors

M = TypeVar("M", bound=nn.Module)
# Where a twin says what it was made of.
IDENTITY = "_denoised_identity"


def twin(module: M) -> M:
    """A structural copy with the same Parameter objects and buffers, that nobody watches yet."""
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    bare = copy.copy(module)
    for mark in (*seam.MARKS, IDENTITY):
        vars(bare).pop(mark, None)
    return copy.deepcopy(bare, memo)


def own_weights(module: nn.Module, names: Collection[str]) -> None:
    """Gives a twin weights of its own under these names, with equal values: for what changes them in place."""
    wanted = {id(parameter) for name, parameter in module.named_parameters() if name in names}
    copies: dict[int, nn.Parameter] = {}
    for _, part, leaf, parameter in _parameters(module):
        if id(parameter) in wanted:
            if id(parameter) not in copies:
                copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            part._parameters[leaf] = copies[id(parameter)]


class Fresh:
    """What is new in modules, beside those that they are twins of: modules, and weights by role and name."""

    def __init__(self, changes: Mapping[str, Any], originals: Mapping[str, nn.Module]) -> None:
        self.modules = {
            role: part
            for role, part in changes.items()
            if isinstance(part, nn.Module) and part is not originals.get(role) and seam.MARKS[0] not in vars(part)
        }
        self.weights: dict[str, tuple[nn.Module, str, nn.Parameter]] = {}
        for role, module in self.modules.items():
            known = _storages(originals[role]) if role in originals else set()
            for name, part, leaf, parameter in _parameters(module):
                if known.isdisjoint(_addresses(parameter)):
                    self.weights[f"{role}.{name}"] = part, leaf, parameter

    def replace(self, container: nn.Module) -> None:
        """Takes the weights that a container has instead."""
        for name, (part, leaf, _) in self.weights.items():
            part._parameters[leaf] = container._parameters[name]

    def contained(self, kind: type[nn.Module]) -> nn.Module:
        """The weights in a module of this kind, so that they can be counted and shared as a component."""
        container = kind()
        for name, (_, _, parameter) in self.weights.items():
            if parameter.device.type == "cpu":
                # safetensors maps the file: weights would change with it, or take the process down with it.
                parameter.data = parameter.data.clone()
            # Names with dots, which register_parameter refuses.
            container._parameters[name] = parameter
        return container


class Untouched:
    """Sees to it that shared modules have the weights that they had, whatever was done meanwhile."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._weights = [(parameter, parameter.data) for module in modules for parameter in module.parameters()]

    def __enter__(self) -> Untouched:
        return self

    def __exit__(self, *_: object) -> None:
        for parameter, data in self._weights:
            if parameter.dtype != data.dtype or parameter.data_ptr() != data.data_ptr():
                parameter.data = data


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Every place that holds a parameter: full name, module, name in that module, parameter."""
    for prefix, part in module.named_modules(remove_duplicate=False):
        for leaf, parameter in part._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{leaf}" if prefix else leaf, part, leaf, parameter


def _storages(module: nn.Module) -> set[int]:
    return {address for parameter in module.parameters() for address in _addresses(parameter)}


def _addresses(parameter: nn.Parameter) -> set[int]:
    return {part.untyped_storage().data_ptr() for part in tensors.plain(parameter)}

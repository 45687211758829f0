"""What one request has changed on modules that it shares with others.

A pipeline may change a component, call it, and change it back: PAG puts its attention processors on the UNet for the
whole loop, SD-XL casts a float16 VAE to float32 around `decode`, a LoRA scale is set around the text encoder. Requests
switch at calls, so another one could look in between and compute with the wrong weights. Each request therefore has an
overlay: changes that its code makes are recorded, taken off whenever it is switched out, and put on again when it
goes on.

Recorded are attributes set on modules, parameters and buffers replaced by casts and moves, and scales of PEFT layers.
A list or dict inside a module that is changed in place is not seen.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

import greenlet
import torch
from torch import nn

from . import randomness
from .randomness import Randomness

_STORES = ("__dict__", "_parameters", "_buffers", "_modules")
_ABSENT = object()


class _Change(Protocol):
    """One thing that can have a value of its own for a request."""

    def read(self) -> Any: ...

    def write(self, value: Any) -> None: ...

    def same(self, left: Any, right: Any) -> bool: ...


class _Attribute:
    """One name on a module, wherever nn.Module keeps it."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = module, name

    def read(self) -> tuple[Any, ...]:
        # The dictionaries themselves: getattr cannot tell a parameter from an attribute of the same name.
        return tuple(getattr(self._module, store).get(self._name, _ABSENT) for store in _STORES)

    def write(self, value: tuple[Any, ...]) -> None:
        for store, item in zip(_STORES, value, strict=True):
            entries = getattr(self._module, store)
            if item is _ABSENT:
                entries.pop(self._name, None)
            else:
                entries[self._name] = item

    def same(self, left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
        return all(one is other for one, other in zip(left, right, strict=True))


class _Parameter:
    """The data of one parameter: casts replace it under the same Parameter object."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = module, name

    def read(self) -> tuple[nn.Parameter | None, torch.Tensor | None]:
        parameter = self._module._parameters.get(self._name)
        return parameter, None if parameter is None else parameter.data

    def write(self, value: tuple[nn.Parameter | None, torch.Tensor | None]) -> None:
        parameter, data = value
        if parameter is not None and data is not None:
            parameter.data = data
        self._module._parameters[self._name] = parameter

    def same(self, left: Any, right: Any) -> bool:
        (one, data), (other, other_data) = left, right
        if one is not other or data is None or other_data is None:
            return one is other
        return bool(data.dtype == other_data.dtype and data.data_ptr() == other_data.data_ptr())


class _Scaling:
    """Scales of a PEFT layer, by adapter."""

    def __init__(self, module: Any) -> None:
        self._scaling: dict[str, float] = module.scaling

    def read(self) -> dict[str, float]:
        return dict(self._scaling)

    def write(self, value: dict[str, float]) -> None:
        self._scaling.clear()
        self._scaling.update(value)

    def same(self, left: dict[str, float], right: dict[str, float]) -> bool:
        return left == right


class Overlay:
    """The changes of one request, and its randomness. Off to begin with."""

    def __init__(self, randomness: Randomness | None = None) -> None:
        self._randomness = randomness
        self._changes: dict[tuple[int, str], tuple[_Change, Any]] = {}
        self._mine: list[Any] | None = None

    def __bool__(self) -> bool:
        return bool(self._changes)

    def touches(self, module: nn.Module) -> bool:
        """Whether something of the module, or of its parts, is changed."""
        if not self._changes:
            return False
        # Anew each time: parts come and go with adapters.
        parts = {id(part) for part in module.modules()}
        return any(changed in parts for changed, _ in self._changes)

    def note_attribute(self, module: nn.Module, name: str) -> None:
        """To be called before the attribute is set."""
        self._note((id(module), name), lambda: _Attribute(module, name))

    def note_tensors(self, module: nn.Module) -> None:
        """To be called before the module's own parameters and buffers are replaced."""
        for name in module._parameters:
            self._note((id(module), name), lambda name=name: _Parameter(module, name))  # type: ignore[misc]
        for name in module._buffers:
            self._note((id(module), name), lambda name=name: _Attribute(module, name))  # type: ignore[misc]

    def note_scaling(self, module: Any) -> None:
        self._note((id(module), "scaling"), lambda: _Scaling(module))

    def put_on(self) -> None:
        if self._randomness is not None:
            self._randomness.put_on()
        else:
            randomness.put_away()
        if self._mine is not None:
            for (change, _), value in zip(self._changes.values(), self._mine, strict=True):
                change.write(value)
            self._mine = None

    def take_off(self) -> None:
        """Restores what was there before, and forgets changes that amount to nothing.

        The randomness stays on until somebody else draws.
        """
        if not self._changes:
            return
        kept, mine = {}, []
        # In reverse: the same thing may have been reached in two ways, and the oldest value is the one to restore.
        for key, (change, base) in reversed(list(self._changes.items())):
            value = change.read()
            if not change.same(value, base):
                kept[key] = (change, base)
                mine.append(value)
                change.write(base)
        self._changes, self._mine = dict(reversed(kept.items())), mine[::-1]

    def _note(self, key: tuple[int, str], change: Callable[[], _Change]) -> None:
        if key not in self._changes:
            made = change()
            self._changes[key] = (made, made.read())


def current() -> Overlay | None:
    """The overlay of the request that runs on this thread; None elsewhere, in loaders and in component calls."""
    return getattr(greenlet.getcurrent(), "overlay", None)


def install() -> None:
    """Makes torch and PEFT tell the running request's overlay about changes; once for the process."""
    if getattr(nn.Module, "_denoised_overlay", False):
        return
    nn.Module._denoised_overlay = True  # type: ignore[attr-defined]
    set_attribute, apply = nn.Module.__setattr__, nn.Module._apply

    def noting_set_attribute(self: nn.Module, name: str, value: Any) -> None:
        if (overlay := current()) is not None and "_parameters" in self.__dict__:
            overlay.note_attribute(self, name)
        set_attribute(self, name, value)

    def noting_apply(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if (overlay := current()) is not None:
            overlay.note_tensors(self)
        return apply(self, *args, **kwargs)

    nn.Module.__setattr__ = noting_set_attribute  # type: ignore[method-assign]
    nn.Module._apply = noting_apply  # type: ignore[method-assign]
    if importlib.util.find_spec("peft") is not None:
        _install_in_peft()


def _install_in_peft() -> None:
    from peft.tuners.lora import LoraLayer

    for name in ("scale_layer", "unscale_layer", "set_scale"):
        original = getattr(LoraLayer, name)

        def noting(self: Any, *args: Any, original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            if (overlay := current()) is not None:
                overlay.note_scaling(self)
            return original(self, *args, **kwargs)

        setattr(LoraLayer, name, noting)

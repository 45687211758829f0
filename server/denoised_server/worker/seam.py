"""Where component calls leave a pipeline: `module.forward` and its like hand the call to the engine.

A component called outside of a request, as in tests and while loading, runs as it always did.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import greenlet
import torch
from diffusers.hooks import HookRegistry
from torch import nn

from . import joining

_numbers = itertools.count()


@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """One method of a component that requests call; `number` is its alone for the life of the process."""

    module: nn.Module
    name: str
    original: Callable[..., Any]
    parameters: list[inspect.Parameter]
    number: int = field(default_factory=_numbers.__next__)

    def __str__(self) -> str:
        return f"{type(self.module).__name__}.{self.name}"


class Caller(Protocol):
    """The request that runs on a greenlet, as the seam needs it."""

    def call(self, method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


def watch(module: nn.Module) -> None:
    """Hands calls of the module, from now on, to the request that makes them. Watching again changes nothing."""
    if "_denoised_methods" in vars(module):
        return
    vars(module)["_denoised_methods"] = methods = [
        name for name in ("forward", "encode", "decode") if callable(getattr(module, name, None))
    ]
    for name in methods:
        original = getattr(module, name)
        vars(module)[name] = _yielding(Method(module, name, original, joining.parameters(original)))
    if hasattr(module, "set_attn_processor"):
        vars(module)["set_attn_processor"] = _noting_processors(module, cast(Any, module).set_attn_processor)
    if hasattr(module, "cache_context"):
        # Made on first use otherwise, which would look like a change that one request made.
        HookRegistry.check_if_exists_or_initialize(module)


def unwatch(module: nn.Module) -> None:
    for name in (*vars(module).pop("_denoised_methods", ()), "set_attn_processor"):
        vars(module).pop(name, None)


def _yielding(method: Method) -> Callable[..., Any]:
    @functools.wraps(method.original)
    def call(*args: Any, **kwargs: Any) -> Any:
        caller: Caller | None = getattr(greenlet.getcurrent(), "caller", None)
        if caller is None or not _switchable():
            return method.original(*args, **kwargs)
        return caller.call(method, args, kwargs)

    return call


def _switchable() -> bool:
    """Whether torch's modes on this thread are the engine's own.

    A mode that a pipeline entered around a call, such as autocast, would reach every request on the thread if the call
    yielded. Such a call runs at once, alone.
    """
    return not (
        torch.is_grad_enabled()
        or torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch.get_default_dtype() != torch.float32
        or _attention_kernels() != _ALL_ATTENTION_KERNELS
    )


def _attention_kernels() -> tuple[bool, ...]:
    return (
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
    )


_ALL_ATTENTION_KERNELS = _attention_kernels()


def _noting_processors(module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set_attn_processor(*args: Any, **kwargs: Any) -> Any:
        overlay = getattr(greenlet.getcurrent(), "overlay", None)
        if overlay is not None:
            # Attention.set_processor takes the old processor out of the module behind nn.Module's back.
            for part in module.modules():
                if hasattr(part, "processor"):
                    overlay.note_attribute(part, "processor")
        return original(*args, **kwargs)

    return set_attn_processor

"""Where component calls leave a pipeline: `module.forward` and its like hand the call to the engine.

A component called outside of a request, as in tests and while loading, runs as it always did.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, cast

import greenlet
import torch
from diffusers.hooks import HookRegistry
from torch import nn

from . import joining, phases
from .overlay import Overlay
from .splitting import Layout

# What `watch` leaves on a module.
MARKS = ("_denoised_methods", "forward", "encode", "decode", "generate", "set_attn_processor", "_diffusers_hook")


@dataclass(frozen=True, slots=True)
class Verified:
    """A kind of joined call that was seen to agree with running alone.

    `places` are those of the arguments that differed between the calls when it did; `cuts` say how its result is taken
    apart.
    """

    places: frozenset[int]
    cuts: Layout


@dataclass(slots=True, eq=False)
class Method:
    """One method of a component that requests call, and what is known of joining its calls.

    `refused` are the keys of those that never run joined again; `phase` says what its calls are for.
    """

    module: nn.Module
    name: str
    original: Callable[..., Any]
    parameters: list[inspect.Parameter]
    verified: dict[Hashable, Verified] = field(default_factory=dict)
    refused: set[Hashable] = field(default_factory=set)
    phase: str = field(init=False)
    _text: str = field(init=False)

    def __post_init__(self) -> None:
        self.phase, self._text = phases.of(self.module, self.name), f"{type(self.module).__name__}.{self.name}"

    def __str__(self) -> str:
        return self._text


class Caller(greenlet.greenlet):
    """A greenlet on which a request runs. `overlay` holds what the request changes; None while a call runs inline.

    `entered` hears the phase of each call before it is made.
    """

    overlay: Overlay | None
    entered: Callable[[str], None] | None = None

    def call(self, method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hands the call to the engine, and returns with its result."""
        raise NotImplementedError

    def park(self) -> Any:
        """Sleeps until somebody outside wakes the request, and returns with what they brought. Others go on."""
        raise NotImplementedError

    def inline(self, method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the call at once. What a component sets on itself meanwhile is its own, as in any call."""
        overlay, self.overlay = self.overlay, None
        try:
            return method.original(*args, **kwargs)
        finally:
            self.overlay = overlay


def watch(module: nn.Module) -> None:
    """Hands calls of the module, from now on, to the request that makes them. Watching again changes nothing.

    There is no way back: a request may be inside a call of the module for as long as the module lives.
    """
    if "_denoised_methods" in vars(module):
        return
    vars(module)["_denoised_methods"] = methods = [
        name for name in ("forward", "encode", "decode") if callable(getattr(module, name, None))
    ]
    for name in methods:
        original = getattr(module, name)
        vars(module)[name] = _handing(Method(module, name, original, joining.parameters(original)))
    if hasattr(module, "generate") and any(hasattr(part, "rope_deltas") for part in module.modules()):
        # From the first call to the last it keeps positions on itself, which those of another request would replace.
        vars(module)["generate"] = _handing(Method(module, "generate", cast(Any, module).generate, []), is_whole=True)
    if hasattr(module, "set_attn_processor"):
        vars(module)["set_attn_processor"] = _noting_processors(module, cast(Any, module).set_attn_processor)
    if hasattr(module, "cache_context"):
        # Made on first use otherwise, which would look like a change that one request made.
        HookRegistry.check_if_exists_or_initialize(module)


def _handing(method: Method, *, is_whole: bool = False) -> Callable[..., Any]:
    """The method for requests: each of its calls yields to the engine, unless it is to run whole."""

    @functools.wraps(method.original)
    def call(*args: Any, **kwargs: Any) -> Any:
        caller = greenlet.getcurrent()
        if not isinstance(caller, Caller) or caller.overlay is None:
            return method.original(*args, **kwargs)
        if caller.entered is not None:
            caller.entered(method.phase)
        may_yield = not is_whole and switchable()
        return caller.call(method, args, kwargs) if may_yield else caller.inline(method, args, kwargs)

    return call


def switchable() -> bool:
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

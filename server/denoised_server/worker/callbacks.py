"""Callbacks of a request: its caller is asked at the end of a step, and the request sleeps until the reply is there."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import greenlet
import numpy as np
import torch
from denoised import media
from denoised.allowance import NUMBERS_ONLY
from denoised.errors import GenerationInterruptedError, InvalidFieldError, PipelineRejectedError, UnknownArgumentError
from denoised.values import Plain
from denoised_server.messages import Callback, Reply, StepEnd
from diffusers import DiffusionPipeline

from . import seam

ON_STEP_END = "callback_on_step_end"
LEGACY = "callback"
LATENTS = "latents"


class Callbacks:
    """Stands in for the caller's callbacks inside the worker.

    A family whose `__call__` takes a callback of that name gets one. `callback_on_step_end` of a family that takes none
    is asked at its noise scheduler's steps, for the latents.
    """

    def __init__(
        self, wanted: Mapping[str, Callback], pipeline: DiffusionPipeline, emit: Callable[[StepEnd], None]
    ) -> None:
        self._wanted, self._emit = wanted, emit
        takes, self._heeds_interrupt = _of_class(cast(Any, type(pipeline)))
        self._native = wanted.keys() & takes
        self._steps = 0
        for name, callback in wanted.items():
            self._check(name, callback, pipeline)

    def arguments(self) -> dict[str, Any]:
        """What to pass to `__call__`."""
        given: dict[str, Any] = {}
        for name in self._native:
            if name == LEGACY:
                given |= {LEGACY: self._legacy, "callback_steps": self._wanted[name].period}
            else:
                given |= {name: self._on_step_end(name), f"{name}_tensor_inputs": [*self._wanted[name].tensor_inputs]}
        return given

    def stepped(self, view: Any, timestep: Any, result: Any) -> Any:
        """To be called at each step of a noise scheduler; returns the result to go on with."""
        if ON_STEP_END not in self._wanted or ON_STEP_END in self._native:
            return result
        names = self._wanted[ON_STEP_END].tensor_inputs
        latents = result[0] if isinstance(result, tuple) else result.prev_sample
        changed = self._ask(ON_STEP_END, view, self._steps, timestep, dict.fromkeys(names, latents))
        self._steps += 1
        if LATENTS not in changed:
            return result
        if isinstance(result, tuple):
            return (changed[LATENTS], *result[1:])
        result.prev_sample = changed[LATENTS]
        return result

    def _on_step_end(self, name: str) -> Callable[..., Any]:
        def callback(view: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            return tensors | self._ask(name, view, step, timestep, tensors)

        return callback

    def _legacy(self, step: int, timestep: Any, latents: Any) -> None:
        self._ask(LEGACY, None, step, timestep, {LATENTS: latents})

    def _ask(self, name: str, view: Any, step: int, timestep: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
        if not seam.switchable():
            raise PipelineRejectedError(
                f"{name} cannot be asked inside a mode of torch that this family is in at its steps.",
                hint="Leave the callback out; progress arrives as events of the call.",
            )
        packed = {key: media.pack(value) for key, value in tensors.items()}
        state = dict(_state(view)) if view is not None else {}
        self._emit(StepEnd(name, step, media.pack(timestep), packed, state))
        caller = cast(seam.Caller, greenlet.getcurrent())
        reply: Answer = caller.park()
        self._set_state(view, reply.state, state)
        return {key: _like(tensors[key], value) for key, value in reply.tensors.items() if key in tensors}

    def _set_state(self, view: Any, new: Mapping[str, Plain], known: Mapping[str, Plain]) -> None:
        for name, value in new.items():
            if name == "_interrupt" and value and not self._heeds_interrupt:
                raise GenerationInterruptedError(
                    "The callback stopped the generation, and this family has no image to show before its last step.",
                    hint="Families that heed `_interrupt` in diffusers return what they have.",
                )
            if view is not None and name.startswith("_") and (name in known or name == "_interrupt"):
                vars(view)[name] = value

    def _check(self, name: str, callback: Callback, pipeline: DiffusionPipeline) -> None:
        if name not in self._native and name != ON_STEP_END:
            raise UnknownArgumentError(
                f"A {type(pipeline).__name__} takes no {name!r}.",
                hint=f"Every pipeline takes {ON_STEP_END!r}.",
                metadata={"argument": name, "suggestion": ON_STEP_END},
            )
        known = set(_tensor_inputs(pipeline)) if name in self._native else {LATENTS}
        unknown = [tensor for tensor in callback.tensor_inputs if tensor not in known]
        if unknown and name != LEGACY:
            raise InvalidFieldError.of(
                f"{name}_tensor_inputs",
                f"a {type(pipeline).__name__} has no {unknown[0][:64]!r} to give at its steps.",
                hint=f"It has {', '.join(sorted(known)) or 'none'}.",
            )


def tensor_inputs(pipeline: DiffusionPipeline) -> tuple[str, ...]:
    """What `callback_on_step_end` may be asked for."""
    call = inspect.unwrap(cast(Any, type(pipeline)).__call__)
    if ON_STEP_END not in inspect.signature(call).parameters:
        return (LATENTS,)
    return tuple(dict.fromkeys(_tensor_inputs(pipeline)))


class Answer:
    """A Reply with its tensors decoded."""

    def __init__(self, reply: Reply) -> None:
        """Raises InvalidMediaError."""
        self.state = reply.state
        self.tensors = {name: media.unpack(value, NUMBERS_ONLY) for name, value in reply.tensors.items()}


@functools.cache
def _of_class(kind: Any) -> tuple[frozenset[str], bool]:
    """What a family's `__call__` takes, and whether it heeds `_interrupt`."""
    call = inspect.unwrap(kind.__call__)
    takes = frozenset(inspect.signature(call).parameters)
    if LEGACY in call.__code__.co_consts:
        # Some families take the legacy callback from their catch-all.
        takes |= {LEGACY}
    return takes, "interrupt" in call.__code__.co_names


def _tensor_inputs(pipeline: DiffusionPipeline) -> Iterator[str]:
    yield from getattr(pipeline, "_callback_tensor_inputs", ())
    for part in vars(pipeline).values():
        if isinstance(part, DiffusionPipeline):
            yield from _tensor_inputs(part)


def _state(view: Any) -> Iterator[tuple[str, Plain]]:
    """What a callback may look at on the pipeline: its own scalars, and what its properties make of them."""
    for name, value in vars(view).items():
        if name.startswith("_") and _is_scalar(value):
            yield name, value
    kind: Any = type(view)
    for name in _properties(kind):
        try:
            value = getattr(view, name)
        except Exception:
            # Of a stage that has not begun yet.
            continue
        if _is_scalar(value):
            yield name, value


@functools.cache
def _properties(kind: Any) -> tuple[str, ...]:
    """Those that a family has beyond what every pipeline has."""
    names = [name for name in dir(kind) if not name.startswith("_") and not hasattr(DiffusionPipeline, name)]
    return tuple(name for name in names if isinstance(inspect.getattr_static(kind, name), property))


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _like(before: Any, value: Any) -> Any:
    """What came back, where what it replaces is. Callers without torch send arrays, which know no bfloat16."""
    if not isinstance(before, torch.Tensor):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value).to(before)
    return value.to(before.device) if isinstance(value, torch.Tensor) else value

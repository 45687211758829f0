"""Callbacks of `pipe(...)`: what the daemon is told of them, and what they make of the end of a step."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from . import media
from .errors import InvalidFieldError, UnsupportedError
from .v1 import generation_service_pb2 as pb
from .values import NDARRAY, TENSOR, Artifact, Plain, from_proto, to_proto

ON_STEP_END = "callback_on_step_end"
PRIOR = "prior_callback_on_step_end"
# diffusers' older form: called with the step, the timestep and the latents.
LEGACY = "callback"


class Callbacks:
    """The callbacks among the arguments of a call, which it takes out of them.

    Attributes:
        told: One that wants no tensors: it is told of steps, and nothing waits for it.
        asked: Those that are asked at each step, by the name of their parameter, as the daemon gets to know them.
    """

    def __init__(self, named: dict[str, Any]) -> None:
        self.told: Callable[..., Any] | None = None
        self.asked: dict[str, pb.Callback] = {}
        self._functions: dict[str, Callable[..., Any]] = {}
        for name in (ON_STEP_END, PRIOR):
            function, inputs = named.pop(name, None), named.pop(f"{name}_tensor_inputs", None)
            if function is None:
                continue
            # diffusers' own callback classes bring the names of the tensors that they want.
            own = getattr(function, "tensor_inputs", None)
            if name == ON_STEP_END and own is None and inputs is not None and not list(inputs):
                self.told = _callable(name, function)
                continue
            inputs = own if own is not None else ["latents"] if inputs is None else inputs
            self._ask(name, function, pb.Callback(tensor_inputs=[str(each) for each in inputs]))
        function, period = named.pop(LEGACY, None), named.pop("callback_steps", None)
        if function is not None:
            self._ask(LEGACY, function, pb.Callback(tensor_inputs=["latents"], period=1 if period is None else period))

    def _ask(self, name: str, function: Any, callback: pb.Callback) -> None:
        self._functions[name] = _callable(name, function)
        self.asked[name] = callback

    def at(self, step_end: pb.StepEnd) -> Step:
        """The end of a step, for the callback that it is for."""
        return Step(step_end, self._functions[step_end.callback], self.asked[step_end.callback].tensor_inputs)


class Step:
    """The end of one step.

    Attributes:
        state: Scalars of the remote pipeline object, such as `guidance_scale`; the callback may set those that begin
            with an underscore.
    """

    def __init__(self, step_end: pb.StepEnd, function: Callable[..., Any], inputs: Iterable[str]) -> None:
        self._step_end, self._function = step_end, function
        self.state: dict[str, Any] = {name: from_proto(value) for name, value in step_end.state.items()}
        # In the order in which they were asked for: a message has none.
        self._tensors = {
            name: _unpack(from_proto(step_end.tensors[name])) for name in inputs if name in step_end.tensors
        }
        # Before the callback gets them: what it changes in place counts as well.
        self._given = {name: media.pack(value) for name, value in self._tensors.items()}

    def run(self, pipe: object) -> Any:
        """Calls the callback as diffusers does; what it returns may have to be awaited."""
        step, timestep = self._step_end.step, _unpack(from_proto(self._step_end.timestep))
        if self._step_end.callback == LEGACY:
            return self._function(step, timestep, self._tensors["latents"])
        return self._function(pipe, step, timestep, dict(self._tensors))

    def reply(self, returned: Any, *, interrupt: bool) -> pb.GenerateInteractivelyRequest:
        """What the daemon is told of what the callback returned and did. Raises InvalidFieldError."""
        changed = self._tensors | (dict(returned) if isinstance(returned, Mapping) else {})
        tensors: dict[str, Plain] = {}
        for name, before in self._given.items():
            try:
                after = media.pack(changed[name])
            except TypeError as error:
                raise InvalidFieldError.of(
                    f"{self._step_end.callback}: {name}", f"{error}.", hint="Return a tensor or an array."
                ) from error
            if after != before:
                tensors[name] = after
        state = {
            name: value
            for name, value in self.state.items()
            if name.startswith("_") and value != from_proto(self._step_end.state[name])
        }
        state |= {"_interrupt": True} if interrupt else {}
        reply = pb.StepReply(
            tensors={name: to_proto(value) for name, value in tensors.items()},
            state={name: to_proto(value) for name, value in state.items()},
        )
        return pb.GenerateInteractivelyRequest(reply=reply)


async def awaited(returned: Any) -> Any:
    """What a callback returned, or what the coroutine that it returned does."""
    return await returned if inspect.isawaitable(returned) else returned


def unawaited(returned: Any) -> Any:
    """What a callback returned. Raises UnsupportedError for what a blocking call cannot wait for."""
    if inspect.iscoroutine(returned):
        returned.close()
    if inspect.isawaitable(returned):
        raise UnsupportedError(
            "callback_on_step_end: what it returns would have to be awaited.",
            hint="Give a plain function, or use denoised.aio.",
        )
    return returned


def _callable(name: str, function: Any) -> Callable[..., Any]:
    if not callable(function):
        raise InvalidFieldError.of(name, f"a {type(function).__name__} cannot be called.", hint="Give a function.")
    return function  # type: ignore[no-any-return]


def _unpack(value: Plain) -> Any:
    """Tensors as torch has them, or as arrays where torch is not installed."""
    if isinstance(value, Artifact) and value.media_type == TENSOR and importlib.util.find_spec("torch") is None:
        if value.dtype == "bfloat16":
            # NumPy has no such type: it is the upper half of a float32.
            wide = np.frombuffer(value.data, np.uint16).astype(np.uint32) << 16
            value = Artifact(NDARRAY, wide.tobytes(), "float32", value.shape, value.dim_order)
        else:
            value = Artifact(NDARRAY, value.data, value.dtype, value.shape, value.dim_order)
    return media.unpack(value)

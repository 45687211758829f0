"""One `pipe(...)`: what is sent, and what comes of the events."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import adapter, arguments
from .adapter import Adapters
from .errors import InternalError, InvalidFieldError, UnsupportedError
from .progress import DenoisingBar
from .result import PipelineOutput, assemble
from .units import to_duration
from .v1 import generation_service_pb2 as pb

# A bar is drawn no more often than this.
BAR_SECONDS = 0.1
# Called as diffusers calls it: pipeline, step, timestep, tensors.
StepCallback = Callable[[Any, int, Any, dict[str, Any]], Any]


class Call:
    """Takes the arguments of a call, has its request, receives its events and gives its result."""

    def __init__(
        self,
        pipeline: str,
        parameters: Sequence[str],
        positional: Sequence[Any],
        keywords: Mapping[str, Any],
        *,
        batching: str,
        priority: int,
        seed: int | Sequence[int] | None,
        media_type: str,
        quality: int | None,
        adapters: Adapters | None,
        loaded_adapters: Sequence[str],
        target: str,
    ) -> None:
        named = arguments.by_name(parameters, positional, keywords)
        self._output_type = _output_type(named.pop("output_type", "pil"))
        self._returns_dict = bool(named.pop("return_dict", True))
        self._callback = _callback(named)
        self._completed_steps = 0
        self._outputs: list[pb.Output] = []
        self._summary: pb.Summary | None = None

        self.request = pb.GenerateRequest(
            pipeline=pipeline,
            batching=arguments.batching_number(batching),
            priority=arguments.priority_number(priority),
        )
        if self._callback is None:
            self.request.progress_interval.CopyFrom(to_duration(BAR_SECONDS))
        if adapters is not None:
            self.request.adapters.CopyFrom(adapter.select(adapters, loaded_adapters))
        arguments.add_seeds(self.request, seed)
        self._generators: tuple[Any, ...] = ()
        if (generator := named.pop("generator", None)) is not None:
            self._generators = arguments.add_generators(self.request, generator)
        arguments.add_output(self.request, self._output_type, media_type=media_type, quality=quality, target=target)
        arguments.add_arguments(self.request, named)

    def receive(self, event: pb.GenerateResponse, pipeline: object, bar: DenoisingBar) -> None:
        """Shows progress and keeps what arrived. What the caller's callback raises comes through."""
        match event.WhichOneof("event"):
            case "queued":
                bar.wait(event.queued.position)
            case "progress":
                bar.step(event.progress.completed_steps, event.progress.total_steps)
                self._report(pipeline, event.progress.completed_steps)
            case "output":
                self._outputs.append(event.output)
            case "summary":
                self._summary = event.summary

    def result(self) -> Any:
        """A PipelineOutput, or a tuple where the caller said `return_dict=False`."""
        if self._summary is None:
            raise InternalError("The daemon ended the generation without a summary.")
        arguments.set_generators(self._generators, self._summary.generators)
        output: PipelineOutput = assemble(self._outputs, self._summary, is_pil=self._output_type == "pil")
        return output if self._returns_dict else output.all_fields()

    def _report(self, pipeline: object, completed_steps: int) -> None:
        # A slow reader may find several steps in one event; a callback counts on seeing each.
        for step in range(self._completed_steps, completed_steps):
            if self._callback is not None and self._callback(pipeline, step, None, {}):
                raise UnsupportedError(
                    "callback_on_step_end: tensors cannot be replaced while the daemon denoises.",
                    hint="Return None or an empty dict.",
                )
        self._completed_steps = max(self._completed_steps, completed_steps)


def _output_type(value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidFieldError.of("output_type", f"{value!r} is no text.", hint='Use "pil", "np", "pt" or "latent".')
    if value in ("pt", "latent") and importlib.util.find_spec("torch") is None:
        raise UnsupportedError(f"output_type: {value!r} gives tensors, which need torch.", hint='Use "np" without it.')
    return value


def _callback(named: dict[str, Any]) -> StepCallback | None:
    if named.pop("callback", None) is not None:
        raise UnsupportedError("callback: latents do not leave the daemon.", hint="Use callback_on_step_end.")
    # Only says how often the legacy callback runs.
    named.pop("callback_steps", None)
    callback: StepCallback | None = named.pop("callback_on_step_end", None)
    if inspect.iscoroutinefunction(callback):
        raise UnsupportedError(
            "callback_on_step_end: an async function would never be awaited.",
            hint="Give a plain function; it may start a task.",
        )
    # diffusers' own PipelineCallback classes bring the names of the tensors they want.
    wanted = named.pop("callback_on_step_end_tensor_inputs", None)
    if tensors := wanted or getattr(callback, "tensor_inputs", None):
        raise UnsupportedError(
            f"callback_on_step_end_tensor_inputs: {', '.join(tensors)} cannot leave the daemon while it denoises.",
            hint="Leave it out: the callback is then told of each step, without tensors.",
        )
    return callback

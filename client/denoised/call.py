"""One `pipe(...)`: what is sent, and what comes of the events."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from . import adapter, arguments
from .adapter import Adapters
from .callbacks import Callbacks
from .errors import InternalError, InvalidFieldError, UnsupportedError
from .noise_scheduler import NoiseSchedulerLike, to_message
from .preview import Previews
from .progress import DenoisingBar
from .result import PipelineOutput, assemble
from .units import to_duration
from .v1 import generation_service_pb2 as pb
from .v1.pipeline_service_pb2 import Parameter

# A bar is drawn no more often than this, and the lists of the daemon's generations know no older progress than that.
BAR_SECONDS, LIST_SECONDS = 0.1, 0.5


class Call:
    """Takes the arguments of a call, has its request, receives its events and gives its result."""

    def __init__(
        self,
        pipeline: str,
        parameters: Sequence[Parameter],
        positional: Sequence[Any],
        keywords: Mapping[str, Any],
        *,
        batching: str,
        priority: int,
        seed: int | Sequence[int] | None,
        media_type: str,
        quality: int | None,
        frames_per_second: float | None,
        adapters: Adapters | None,
        embed_manifest: bool,
        loaded_adapters: Sequence[str],
        noise_scheduler: NoiseSchedulerLike | None,
        target: str,
        previews: Previews | None = None,
        has_bar: bool = True,
    ) -> None:
        named = arguments.by_name([parameter.name for parameter in parameters], positional, keywords)
        self._output_type = _output_type(named.pop("output_type", _default_output_type(parameters)))
        self._embeds_manifest = embed_manifest
        self._returns_dict = bool(named.pop("return_dict", True))
        self.callbacks = Callbacks(named)
        self._completed_steps = 0
        self._previews = previews
        self._outputs: list[pb.Output] = []
        self._summary: pb.Summary | None = None

        self.request = pb.GenerateRequest(
            pipeline=pipeline,
            batching=arguments.batching_number(batching),
            priority=arguments.priority_number(priority),
        )
        if self.callbacks.told is None:
            self.request.progress_interval.CopyFrom(to_duration(BAR_SECONDS if has_bar else LIST_SECONDS))
        if adapters is not None:
            self.request.adapters.CopyFrom(adapter.select(adapters, loaded_adapters))
        if noise_scheduler is not None:
            self.request.noise_scheduler.CopyFrom(to_message(noise_scheduler, "noise_scheduler"))
        arguments.add_seeds(self.request, seed)
        self._generators: tuple[Any, ...] = ()
        if (generator := named.pop("generator", None)) is not None:
            self._generators = arguments.add_generators(self.request, generator)
        arguments.add_output(
            self.request,
            self._output_type,
            media_type=media_type,
            quality=quality,
            frames_per_second=frames_per_second,
            target=target,
        )
        arguments.add_arguments(self.request, named)
        if previews is not None:
            previews.ask(self.request)

    @property
    def start(self) -> pb.GenerateInteractivelyRequest:
        """The first message where callbacks are asked."""
        message = pb.GenerateInteractivelyRequest.Start(request=self.request, callbacks=self.callbacks.asked)
        return pb.GenerateInteractivelyRequest(start=message)

    def receive(self, event: pb.GenerateResponse, pipeline: object, bar: DenoisingBar) -> None:
        """Shows progress and keeps what arrived. What the caller's callback raises comes through."""
        match event.WhichOneof("event"):
            case "queued":
                bar.wait(event.queued.position)
            case "progress":
                bar.step(event.progress.completed_steps, event.progress.total_steps)
                self._report(pipeline, event.progress.completed_steps)
            case "phase_began":
                bar.enter(event.phase_began.phase)
            case "preview":
                if self._previews is not None:
                    self._previews.show(event.preview)
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
        if self._embeds_manifest:
            output.embed_manifest()
        return output if self._returns_dict else output.all_fields()

    def _report(self, pipeline: object, completed_steps: int) -> None:
        # A slow reader may find several steps in one event; a callback counts on seeing each.
        for step in range(self._completed_steps, completed_steps):
            if self.callbacks.told is not None:
                self.callbacks.told(pipeline, step, None, {})
        self._completed_steps = max(self._completed_steps, completed_steps)


def _default_output_type(parameters: Sequence[Parameter]) -> str:
    """The pipeline's own: images of most, arrays of those that make sound."""
    own = [parameter.default_value.string_value for parameter in parameters if parameter.name == "output_type"]
    return (own or [""])[0] or "pil"


def _output_type(value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidFieldError.of("output_type", f"{value!r} is no text.", hint='Use "pil", "np", "pt" or "latent".')
    if value in ("pt", "latent") and importlib.util.find_spec("torch") is None:
        raise UnsupportedError(f"output_type: {value!r} gives tensors, which need torch.", hint='Use "np" without it.')
    return value

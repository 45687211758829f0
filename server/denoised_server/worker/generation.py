"""From arguments to `pipeline.__call__` to outputs."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import math
import re
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import greenlet
import torch
from denoised import media
from denoised.allowance import Allowance
from denoised.errors import (
    DenoisedError,
    DeviceOutOfMemoryError,
    InternalError,
    InvalidFieldError,
    PipelineRejectedError,
)
from denoised.fingerprint import fingerprints
from denoised.values import Artifact, Plain
from denoised_server.messages import Finished, Generate, NoiseScheduler, PhaseBegan, Preview, Progress, StepEnd
from diffusers import DiffusionPipeline
from PIL import Image

from . import exhaustion, features, fused, noise_schedulers, pictures, prompt_encoding, recordings, seam
from .batches import Costs
from .callbacks import Callbacks
from .encoding import Encoding
from .observations import Observations
from .previews import Previewer, Previews
from .quotation import quote
from .randomness import Randomness

logger = logging.getLogger(__name__)

STEP_SECONDS_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# Of what runs beside a request to prove that it may be fused.
OTHER_SEED = 1
MISSHAPEN = re.compile(r"\b(shapes?|sizes?|dimensions?|channels|dtype)\b")


class Steps:
    """Counts denoising steps of one request, across the stages of its pipeline.

    Steps are those of the request's own noise schedulers, which every family has; how many there will be is said by the
    progress bar that the pipeline opens, or by the noise scheduler's timesteps where it opens none. A pipeline without
    a noise scheduler is counted by its progress bar. Steps and the phases that begin are told no more often than every
    `interval` seconds, from the beginning on, and the last step of a run that has taken as long. `ended` gets each
    noise scheduler with the arguments and the result of its step, and returns the result to go on with.
    """

    def __init__(
        self,
        emit: Callable[[Progress | PhaseBegan], None],
        step_seconds: Observations,
        interval: float,
        ended: Callable[[Any, Sequence[Any], Mapping[str, Any], Any], Any],
    ) -> None:
        self._emit, self._step_seconds, self._interval, self._ended = emit, step_seconds, interval, ended
        self._phase = ""
        self._began = self._told = time.perf_counter()
        self._is_watching = False
        self._done = self._before = self._calls = self._stage = self._total = 0
        self._last: float | None = None

    def watch(self, scheduler: Any) -> None:
        step, self._is_watching = scheduler.step, True

        @functools.wraps(step)
        def counting(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self._stepped(getattr(scheduler, "order", 1), len(scheduler.timesteps))
            return self._ended(scheduler, args, kwargs, result)

        scheduler.step = counting

    def bar(self, iterable: Any = None, total: int | None = None) -> _Bar:
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)
        self._before, self._calls, self._stage = self._done, 0, total or 0
        return _Bar(iterable, self._updated)

    def _updated(self) -> None:
        if not self._is_watching:
            self._stepped(1, 0)

    def enter(self, phase: str) -> None:
        """What the request does next is of this phase."""
        if phase == self._phase:
            return
        self._phase, now = phase, time.perf_counter()
        if now - self._told >= self._interval:
            self._told = now
            self._emit(PhaseBegan(phase, self._done))

    @property
    def done(self) -> int:
        return self._done

    @property
    def total(self) -> int:
        """As far as known."""
        return self._total

    def share(self) -> float:
        """How much of what is known to come is done, from 0 to 1."""
        total = self._before + self._stage
        return min(1.0, self._done / total) if total else 0.0

    def _stepped(self, order: int, timesteps: int) -> None:
        self._calls += 1
        total = self._stage or math.ceil(timesteps / order)
        # Schedulers of order 2 are stepped twice for each step but the last.
        self._done = self._before + min(total, math.ceil(self._calls / order))
        self._total = self._before + total
        now = time.perf_counter()
        if self._last is not None:
            self._step_seconds.observe(now - self._last)
        self._last = now
        since = self._began if self._done == self._total else self._told
        if now - since >= self._interval:
            self._told = now
            self._emit(Progress(self._done, self._total))


class _Bar:
    """Stands in for tqdm on the daemon's side; the caller's bar is in the caller's terminal."""

    def __init__(self, iterable: Any, updated: Callable[[], None]) -> None:
        self._iterable, self._updated = iterable, updated

    def update(self, *_: object) -> None:
        self._updated()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class Generation:
    """One request: prepared and encoded off the engine's thread, run on it."""

    def __init__(
        self,
        command: Generate,
        pipeline: DiffusionPipeline,
        device: torch.device,
        emit: Callable[[Progress | PhaseBegan | Preview | StepEnd], None],
        step_seconds: Observations,
        enabled: Mapping[str, Mapping[str, Plain]],
        adapter_digests: tuple[str, ...] = (),
        *,
        max_pixels: int,
        previews: Previews | None = None,
    ) -> None:
        self._previews = previews
        self._previewer: Previewer | None = None
        self._command, self._pipeline, self._device, self._enabled = command, pipeline, device, enabled
        self._adapter_digests, self._max_pixels = adapter_digests, max_pixels
        self._emit, self._step_seconds, self._is_left = emit, step_seconds, False
        self._media: dict[str, tuple[str, str]] = {}

        self._callbacks = Callbacks(command.callbacks, pipeline, emit)
        self._steps = Steps(emit, step_seconds, command.progress_interval, self._step_ended)
        self._view = pipeline
        self._members: Sequence[Generation] = ()
        self._generators: list[torch.Generator] = []
        self._arguments: dict[str, Any] = {}
        self._began = 0.0
        self._run_seconds = 0.0

    def prepare(self) -> None:
        """Decodes the arguments. Raises InvalidMediaError and InvalidFieldError."""
        allowance = Allowance.of(self._max_pixels)
        arguments = {name: _unpack(value, allowance) for name, value in self._command.arguments.items()}
        if self._command.method:
            self._arguments = prompt_encoding.arguments(self._pipeline, arguments, self._device)
            return
        _check_mask(arguments)
        self._media = fingerprints(arguments)
        self._generators = list(self._make_generators())
        generator: Any = self._generators
        if len(self._generators) == 1:
            generator = self._generators[0]
        self._arguments = arguments | self._callbacks.arguments()
        self._arguments |= {"generator": generator, "return_dict": True}
        if self._command.output_type:
            self._arguments["output_type"] = self._command.output_type

    @property
    def randomness(self) -> Randomness | None:
        """For what the pipeline draws from no generator of the request's; None where it has none."""
        return Randomness(self._generators[0].initial_seed(), self._device) if self._generators else None

    @property
    def kind(self) -> Hashable:
        """Equal for those that `fuse` may run as one; None for one that runs by itself. To be asked when prepared."""
        command = self._command
        if command.method or command.callbacks or command.adapters is not None or len(self._generators) != 1:
            return None
        if command.preview is not None:
            # Previews are of one request.
            return None
        likeness = fused.likeness(self._arguments, self._media)
        if likeness is None:
            return None
        return fused.identity(self._pipeline), fused.plain(self._enabled), likeness, command.progress_interval

    def fuse(self, others: Sequence[Generation]) -> Generation:
        """One that runs this one and others of its kind as one `__call__`; they share its result."""
        members = (self, *others)

        def tell(event: Progress | PhaseBegan | Preview | StepEnd) -> None:
            for member in members:
                if not member._is_left:
                    member._emit(event)

        together = self._another(self._command, tell, self._step_seconds)
        together._members = members
        together._generators = [generator for member in members for generator in member._make_generators()]
        together._arguments = fused.together([member._arguments for member in members])
        together._arguments["generator"] = together._generators
        return together

    def share(self, result: Any) -> list[Any]:
        """What came of fused ones, as each one's own. Raises NotSplittableError."""
        parts = fused.parts(result, len(self._members))
        for member, generator in zip(self._members, self._generators, strict=True):
            member._run_seconds, member._generators, member._steps = self._run_seconds, [generator], self._steps
        return parts

    def proof(self) -> tuple[Generation, Generation]:
        """Another one of its kind that nobody asked for, and both as one."""
        command = replace(self._command, seeds=(OTHER_SEED,), generators=())
        unheard = Observations(STEP_SECONDS_BOUNDS)
        like = self._another(command, lambda *_: None, unheard)
        like._generators = list(like._make_generators())
        like._arguments = fused.otherwise(self._arguments) | {"generator": like._generators[0]}
        both = self.fuse([like])
        both._steps = Steps(lambda *_: None, unheard, math.inf, both._step_ended)
        return like, both

    def agrees(self, result: Any, alone: Sequence[Any]) -> bool:
        """Whether fused ones came to what each comes to alone, but for rounding."""
        return all(map(fused.agree, fused.parts(result, len(alone)), alone, itertools.repeat(self._pipeline.dtype)))

    def _another(
        self,
        command: Generate,
        emit: Callable[[Progress | PhaseBegan | Preview | StepEnd], None],
        step_seconds: Observations,
    ) -> Generation:
        return Generation(
            command, self._pipeline, self._device, emit, step_seconds, self._enabled, max_pixels=self._max_pixels
        )

    def leave(self) -> None:
        """Nobody waits for it any more; what it was fused into goes on."""
        self._is_left = True

    def run(self) -> Any:
        """On the engine's thread: diffusers' own call, on a view of the pipeline that is this request's alone."""
        self._began = time.perf_counter()
        if isinstance(caller := greenlet.getcurrent(), seam.Caller):
            caller.entered = self._steps.enter
        try:
            self._view = _view(self._pipeline, self._steps, {})
            features.enable(self._view, self._enabled)
            if self._command.method:
                return self._view.encode_prompt(**self._arguments)
            if self._previews is not None:
                self._previewer = self._previews.of(self._view, self._arguments, self._command.preview, self._emit)
            return self._view(**self._arguments)
        finally:
            self._run_seconds = time.perf_counter() - self._began

    def done(self) -> float:
        """What share of its steps is behind it, from 0 to 1."""
        return self._steps.share()

    def _step_ended(self, scheduler: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Any:
        if self._previewer is not None:
            model_output = args[0] if args else kwargs.get("model_output")
            self._previewer.stepped(scheduler, model_output, result, self._steps.done, self._steps.total)
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        return self._callbacks.stepped(self._view, timestep, result)

    def learn(self, result: Any) -> None:
        """For previews of others, when all outputs are there. On any thread."""
        if self._previewer is not None:
            self._previewer.fit(result)

    @property
    def learns(self) -> bool:
        return self._previewer is not None

    def encoding(self, result: Any) -> Encoding:
        """The outputs that the result is to become."""
        encoding = Encoding(result, self._command, self._pipeline, self._arguments)
        if not encoding.is_light:
            self._steps.enter("encode")
        return encoding

    def finished(self, encoding: Encoding, costs: Costs, encode_seconds: float) -> Finished:
        """What there is to say when all outputs are there."""
        return Finished(
            run_seconds=self._run_seconds,
            device_seconds=costs.device_seconds,
            encode_seconds=encode_seconds,
            steps=self._steps.done,
            calls=costs.calls,
            joined_calls=costs.joined_calls,
            max_joined=costs.max_joined,
            generators=self._advanced(),
            fields=encoding.fields,
            field_names=encoding.field_names,
            noise_scheduler=self._noise_scheduler(),
            media=self._media,
            adapter_digests=self._adapter_digests,
            phases=costs.phases.runs(),
            batch_sizes=tuple(sorted(costs.batch_sizes.items())),
            recoveries=tuple(map(str, costs.recoveries)),
        )

    def _noise_scheduler(self) -> NoiseScheduler | None:
        """That of the request, where it brought one: with its whole configuration."""
        if self._command.noise_scheduler is None:
            return None
        return noise_schedulers.describe(self._pipeline.scheduler)

    def _advanced(self) -> tuple[tuple[str, bytes], ...]:
        """Advanced states of the generators that the caller sent."""
        if not self._command.generators:
            return ()
        return tuple((generator.device.type, generator.get_state().numpy().tobytes()) for generator in self._generators)

    def _make_generators(self) -> Iterator[torch.Generator]:
        for seed in self._command.seeds:
            # On the CPU whatever the device is: the same seed gives the same image everywhere.
            yield torch.Generator("cpu").manual_seed(seed)
        for device, state in self._command.generators:
            if device != "cpu" and device != self._device.type:
                raise InvalidFieldError.of(
                    "sampling.generators", f"this worker has no {device!r} device.", hint="Use a CPU generator."
                )
            generator = torch.Generator(device)
            try:
                generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
            except (RuntimeError, ValueError, TypeError):
                raise InvalidFieldError.of(
                    "sampling.generators", "the state is not one that torch.Generator.get_state returned."
                ) from None
            yield generator


def failure(error: BaseException) -> DenoisedError:
    """What a pipeline raised, as one of ours. The log has the rest."""
    if isinstance(error, DenoisedError):
        return error
    if exhaustion.is_out_of_memory(error):
        # Between calls: those are recovered where they run.
        logger.warning("out of memory while running")
        return DeviceOutOfMemoryError(
            "The device ran out of memory while running.",
            hint="Ask for fewer or smaller images, or unload a pipeline.",
            retry_after=1.0,
        )
    # Weights fit each other, or loading had failed: shapes that do not are those of the arguments.
    misshapen = type(error) is RuntimeError and MISSHAPEN.search(str(error))
    if misshapen or isinstance(error, ValueError | TypeError | AttributeError | NotImplementedError):
        logger.debug("a pipeline refused its arguments", exc_info=error)
        return PipelineRejectedError(
            f"The pipeline refused its arguments: {quote(error)}.",
            hint="`parameters` of the pipeline says what it takes.",
        )
    logger.error("a pipeline failed", exc_info=error)
    return InternalError(f"The pipeline failed with {type(error).__name__}.", hint="The daemon's log has the rest.")


def _view(pipeline: DiffusionPipeline, steps: Steps, schedulers: dict[int, Any]) -> DiffusionPipeline:
    """The same components under a pipeline object and noise schedulers of the request's own, in sub-pipelines too."""
    view = copy.copy(pipeline)
    own: dict[str, Any] = {"progress_bar": steps.bar} | pictures.defer(pipeline)
    for name, value in vars(pipeline).items():
        if isinstance(value, DiffusionPipeline):
            own[name] = _view(value, steps, schedulers)
        elif hasattr(value, "set_timesteps") and hasattr(value, "step"):
            if id(value) not in schedulers:
                schedulers[id(value)] = noise_schedulers.copied(value)
                steps.watch(schedulers[id(value)])
            own[name] = schedulers[id(value)]
    # Not by setattr, which would rewrite the configuration that the view shares.
    vars(view).update(own)
    return view


def _unpack(value: Plain, allowance: Allowance) -> Any:
    if isinstance(value, Artifact) and value.media_type.startswith("video/"):
        return recordings.frames(value, allowance)
    return media.unpack(value, allowance)


def _check_mask(arguments: Mapping[str, Any]) -> None:
    image, mask = arguments.get("image"), arguments.get("mask_image")
    if isinstance(image, Image.Image) and isinstance(mask, Image.Image) and image.size != mask.size:
        raise InvalidFieldError.of(
            "mask_image",
            f"is {mask.width}×{mask.height} pixels and `image` is {image.width}×{image.height}.",
            hint="Scale one to the size of the other.",
        )

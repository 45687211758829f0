"""A pipeline with settings of its own, over components that it shares."""

from __future__ import annotations

import copy
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from denoised.errors import InvalidNoiseSchedulerError
from denoised_server.messages import NoiseScheduler, PipelineSettings
from diffusers import DiffusionPipeline

from . import noise_schedulers
from .construction import Construction

# Noise schedulers that are remembered for a pipeline.
VARIANTS = 32


def configure(pipeline: DiffusionPipeline, settings: PipelineSettings) -> DiffusionPipeline:
    """The pipeline with these settings; the one given stays as it is."""
    if settings.noise_scheduler is None:
        return pipeline
    return with_noise_scheduler(pipeline, settings.noise_scheduler)


def with_noise_scheduler(pipeline: DiffusionPipeline, wanted: NoiseScheduler) -> DiffusionPipeline:
    """Raises InvalidNoiseSchedulerError."""
    present = getattr(pipeline, "scheduler", None)
    if noise_schedulers.describe(present) is None:
        raise InvalidNoiseSchedulerError(
            f"A {type(pipeline).__name__} has no noise scheduler of its own.", hint="Leave it as it is."
        )
    return _replaced(pipeline, present, noise_schedulers.make(wanted, present))


class Variants:
    """Pipelines with the noise schedulers that requests bring, each made once for as long as its pipeline lives.

    Making one has to wait for the engine's turn to end; requests run on views, so any number may share one.
    """

    def __init__(self, construction: Construction) -> None:
        self._construction, self._lock = construction, Lock()
        self._made: WeakKeyDictionary[DiffusionPipeline, dict[str, DiffusionPipeline]] = WeakKeyDictionary()

    def find(self, pipeline: DiffusionPipeline, wanted: NoiseScheduler) -> DiffusionPipeline | None:
        with self._lock:
            return self._made.get(pipeline, {}).get(repr(wanted))

    def make(self, pipeline: DiffusionPipeline, wanted: NoiseScheduler) -> DiffusionPipeline:
        """Raises InvalidNoiseSchedulerError."""
        if (found := self.find(pipeline, wanted)) is not None:
            return found
        with self._construction.turn():
            made = with_noise_scheduler(pipeline, wanted)
        with self._lock:
            known = self._made.setdefault(pipeline, {})
            if len(known) >= VARIANTS:
                known.clear()
            known[repr(wanted)] = made
        return made


def _replaced(pipeline: DiffusionPipeline, present: Any, new: Any) -> DiffusionPipeline:
    """A copy in which one noise scheduler stands wherever another one stood, in sub-pipelines too."""
    view = copy.copy(pipeline)
    for name, value in vars(pipeline).items():
        if isinstance(value, DiffusionPipeline):
            vars(view)[name] = _replaced(value, present, new)
        elif value is present:
            # Writes the configuration as well, into a dictionary that the copy does not share.
            view.register_modules(**{name: new})
    return view

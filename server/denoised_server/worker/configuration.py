"""A pipeline with settings of its own, over components that it shares."""

from __future__ import annotations

import copy
from typing import Any

from denoised.errors import InvalidNoiseSchedulerError
from denoised_server.messages import NoiseScheduler, PipelineSettings
from diffusers import DiffusionPipeline

from . import noise_schedulers


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

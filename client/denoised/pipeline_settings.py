"""Settings of a pipeline that lives in a daemon, with diffusers' names."""
# Generated from aio/pipeline_settings.py by client/unasync.py: edit that one.

from __future__ import annotations

from typing import Any

from .noise_scheduler import NoiseScheduler, NoiseSchedulerLike, from_message, to_message
from .v1 import pipeline_service_pb2 as pb
from .values import to_proto


class PipelineSettings:
    """What can be set on a live pipeline.

    It is the pipeline's own: others that share its components, and those that were derived from it, stay as they are.
    Each method returns when the daemon has done it, and one that fails changes nothing. Generations that are running go
    on as they began.
    """

    __slots__ = ()

    _info: pb.Pipeline

    @property
    def scheduler(self) -> NoiseScheduler:
        """Its noise scheduler: class and configuration. AttributeError for a pipeline that has none."""
        if not self._info.HasField("noise_scheduler"):
            raise AttributeError("This pipeline has no noise scheduler.", name="scheduler", obj=self)
        return from_message(self._info.noise_scheduler)

    @scheduler.setter
    def scheduler(self, scheduler: NoiseSchedulerLike | None) -> None:
        self.set_scheduler(scheduler)

    def set_scheduler(self, scheduler: NoiseSchedulerLike | None) -> None:
        """Gives the pipeline another noise scheduler.

        Args:
            scheduler: A class name of diffusers, which takes over the present configuration; a mapping of arguments to
                put over it; a pair of both; or an object such as `EulerDiscreteScheduler.from_config(…)`, of diffusers
                or of `denoised`, or that of another remote pipeline. None for the checkpoint's own.

        Raises:
            InvalidNoiseSchedulerError: diffusers has no such noise scheduler, or it cannot be configured this way.
        """
        settings = pb.PipelineSettings(noise_scheduler=None if scheduler is None else to_message(scheduler))
        self._update(settings, "noise_scheduler")

    def enable_vae_tiling(self) -> None:
        """Has the VAE work tile by tile, which takes less memory for large images."""
        self._feature("vae_tiling", {})

    def disable_vae_tiling(self) -> None:
        """Has the VAE work on whole images."""
        self._feature("vae_tiling", None)

    def enable_vae_slicing(self) -> None:
        """Has the VAE work on one image of a batch at a time."""
        self._feature("vae_slicing", {})

    def disable_vae_slicing(self) -> None:
        """Has the VAE work on whole batches."""
        self._feature("vae_slicing", None)

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Turns FreeU on, with its scaling factors for skip features (s) and backbone features (b)."""
        self._feature("freeu", {"s1": s1, "s2": s2, "b1": b1, "b2": b2})

    def disable_freeu(self) -> None:
        """Turns FreeU off."""
        self._feature("freeu", None)

    # What the daemon's memory policy decides: taken, so that programs run, and without effect.

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: where weights are decides the daemon."""

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: where weights are decides the daemon."""

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: where weights are decides the daemon."""

    def enable_attention_slicing(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: how attention is computed decides the daemon."""

    def disable_attention_slicing(self) -> None:
        """Does nothing: how attention is computed decides the daemon."""

    def enable_xformers_memory_efficient_attention(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: how attention is computed decides the daemon."""

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Does nothing: how attention is computed decides the daemon."""

    def maybe_free_model_hooks(self) -> None:
        """Does nothing: there are no hooks here."""

    def remove_all_hooks(self) -> None:
        """Does nothing: there are no hooks here."""

    def reset_device_map(self) -> None:
        """Does nothing: where weights are decides the daemon."""

    def _feature(self, name: str, arguments: dict[str, float] | None) -> None:
        settings = pb.PipelineSettings()
        if arguments is not None:
            settings.features[name].SetInParent()
            for key, value in arguments.items():
                settings.features[name].entries[key].CopyFrom(to_proto(value))
        self._update(settings, f"features.{name}")

    def _update(self, settings: pb.PipelineSettings, path: str) -> None:
        """Has the daemon change what the path names."""
        raise NotImplementedError

"""Features that diffusers has `enable_…` methods for, in force for the requests of one pipeline.

They are switches on components that others share, so each request sets its own: what it changes is taken off whenever
it is switched out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from denoised.errors import InvalidFieldError
from denoised.values import Plain
from diffusers import DiffusionPipeline

# Methods, with the arguments that have to be given: those of the VAE itself, and those of the pipeline.
VAE = {"vae_tiling": "tiling", "vae_slicing": "slicing"}
ARGUMENTS = {"vae_tiling": (), "vae_slicing": (), "freeu": ("s1", "s2", "b1", "b2")}
LIMIT = 100.0


def check(pipeline: DiffusionPipeline, features: Mapping[str, Mapping[str, Plain]]) -> None:
    """Raises InvalidFieldError for what the pipeline does not have."""
    for name, arguments in features.items():
        field = f"settings.features[{name[:64]}]"
        if name not in ARGUMENTS:
            raise InvalidFieldError.of(field, "is not known.", hint=f"There is {', '.join(ARGUMENTS)}.")
        if not _has(pipeline, name):
            raise InvalidFieldError.of(field, f"a {type(pipeline).__name__} does not have it.", hint="Leave it out.")
        if set(arguments) != set(ARGUMENTS[name]):
            wanted = ", ".join(ARGUMENTS[name]) or "no arguments"
            raise InvalidFieldError.of(field, f"it takes {wanted}.", hint="Send these and no others.")
        for value in arguments.values():
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LIMIT:
                raise InvalidFieldError.of(field, "an argument is no ordinary number.", hint="Send 0.0 to 2.0.")


def enable(view: Any, features: Mapping[str, Mapping[str, Plain]]) -> None:
    """To be called by the request itself."""
    for name, arguments in features.items():
        if name in VAE:
            getattr(view.vae, f"enable_{VAE[name]}")()
        else:
            view.enable_freeu(**arguments)


def _has(pipeline: Any, name: str) -> bool:
    if name in VAE:
        return hasattr(getattr(pipeline, "vae", None), f"use_{VAE[name]}")
    return hasattr(pipeline, "enable_freeu") and hasattr(getattr(pipeline, "unet", None), "enable_freeu")

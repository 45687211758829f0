"""Whether a pipeline's weights fit what its class feeds them, told from their configurations.

diffusers makes a pipeline of any components, and finds out while it runs: an inpainting UNet takes more channels than
text-to-image has, a refiner another number of conditions than the base.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from denoised.errors import TaskNotSupportedError
from diffusers import DiffusionPipeline

from . import families

TASKS = ("text-to-image", "image-to-image", "inpainting")
# Channels of latents, and what an autoencoder calls them.
LATENT_CHANNELS = ("latent_channels", "z_dim")
# What SD-XL is told of a picture: its size, its crop and the size to make of it. A refiner is told other things.
CONDITIONS = 6


def check(pipeline: DiffusionPipeline, task: str) -> None:
    """Raises TaskNotSupportedError for weights that would fail in every call."""
    if task in TASKS and (found := list(misfits(pipeline))):
        class_name = type(pipeline).__name__
        raise TaskNotSupportedError(
            f"The weights do not fit {task} with a {class_name}: {'; '.join(found)}.",
            hint=f"Weights are made for some tasks of their family. {families.supported(class_name)}",
        )


def misfits(pipeline: DiffusionPipeline) -> Iterator[str]:
    """A sentence for each thing that does not fit. What the configurations do not tell is taken to fit."""
    parts = pipeline.components
    takes = inspect.signature(type(pipeline).__call__).parameters
    latents = _latent_channels(parts)
    for role in ("unet", "transformer"):
        given = _setting(parts.get(role), "in_channels")
        if given and latents and given not in (fed := _fed(role, latents, takes, has_controlnet="controlnet" in parts)):
            yield f"its {role} takes {given} channels, and {' or '.join(map(str, sorted(fed)))} would be fed"
    unet = parts.get("unet")
    if unet is not None:
        yield from _conditions(pipeline, unet)
        yield from _texts(parts, unet)
        yield from _controlnets(parts, unet)


def _latent_channels(parts: dict[str, Any]) -> int:
    autoencoder = parts.get("vae") or parts.get("movq")
    return next((found for name in LATENT_CHANNELS if (found := _setting(autoencoder, name))), 0)


def _fed(role: str, latents: int, takes: Any, *, has_controlnet: bool) -> set[int]:
    """Numbers of channels that a class may feed its denoiser."""
    # A condition without a ControlNet to read it goes beside the latents.
    pictures = 2 if "control_image" in takes and not has_controlnet else 1
    masked = 2 * latents + 1
    if "mask_image" in takes and "strength" not in takes and not has_controlnet:
        # Painting starts from nothing but noise: what is around the mask has to be fed.
        return {masked}
    fed = {pictures * latents} | ({masked} if "mask_image" in takes else set())
    # Some transformers get four neighbouring latents as one.
    return fed | {4 * pictures * latents} if role == "transformer" else fed


def _conditions(pipeline: DiffusionPipeline, unet: Any) -> Iterator[str]:
    """SD-XL's UNets are told sizes in numbers, as many as their first layer has room for."""
    width, text = _setting(unet, "addition_time_embed_dim"), pipeline.components.get("text_encoder_2")
    # With the option, classes tell either number.
    if "requires_aesthetics_score" in inspect.signature(type(pipeline).__init__).parameters:
        return
    if _setting(unet, "addition_embed_type") != "text_time" or not width or not _setting(text, "projection_dim"):
        return
    room = (_setting(unet, "projection_class_embeddings_input_dim") - _setting(text, "projection_dim")) // width
    if room != CONDITIONS:
        yield f"its unet is told {room} numbers of each picture, and {CONDITIONS} would be sent"


def _texts(parts: dict[str, Any], unet: Any) -> Iterator[str]:
    encoders = [part for role, part in parts.items() if role.startswith("text_encoder")]
    widths = [_setting(encoder, "hidden_size") for encoder in encoders]
    reads = _setting(unet, "cross_attention_dim")
    if _setting(unet, "encoder_hid_dim") or not isinstance(reads, int) or not all(widths) or not widths:
        return
    if reads != sum(widths):
        yield f"its unet reads texts of width {reads}, and its text encoders write {sum(widths)}"


def _controlnets(parts: dict[str, Any], unet: Any) -> Iterator[str]:
    found = parts.get("controlnet")
    for net in getattr(found, "nets", [found]):
        for name in ("cross_attention_dim", "block_out_channels"):
            mine, its = _setting(unet, name), _setting(net, name)
            if mine and its and _plain(mine) != _plain(its):
                yield f"its controlnet was made for another unet: {name} is {its}, not {mine}"


def _setting(part: Any, name: str) -> Any:
    """0 where there is no such part or setting."""
    return getattr(getattr(part, "config", None), name, None) or 0


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value

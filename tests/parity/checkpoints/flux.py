"""Flux with control, ControlNet and Kontext; Flux 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import Qwen3ForCausalLM

from . import autoencoders, encoders, tokenizers
from .family import Family, picture
from .weights import filled

SHAPE = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 4, 8],
}


def parts(**transformer: Any) -> dict[str, Any]:
    clip, t5 = tokenizers.clip(), tokenizers.t5()
    return {
        "transformer": filled(FluxTransformer2DModel(**SHAPE | transformer)),
        "vae": autoencoders.shifted(1),
        "text_encoder": encoders.clip_text(clip),
        "text_encoder_2": encoders.t5(t5),
        "tokenizer": clip,
        "tokenizer_2": t5,
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


def plain(folder: Path) -> None:
    FluxPipeline(**parts()).save_pretrained(folder)


def kontext(folder: Path) -> None:
    FluxKontextPipeline(**parts()).save_pretrained(folder)


def control(folder: Path) -> None:
    FluxControlPipeline(**parts(in_channels=8, out_channels=4)).save_pretrained(folder)


def controlnet(folder: Path) -> None:
    FluxControlNetPipeline(**parts(), controlnet=filled(FluxControlNetModel(**SHAPE))).save_pretrained(folder)


def _parts2(**transformer: Any) -> dict[str, Any]:
    shape = SHAPE | {"axes_dims_rope": [4, 4, 4, 4], "timestep_guidance_channels": 256}
    del shape["pooled_projection_dim"]
    return {
        "transformer": filled(Flux2Transformer2DModel(**shape | transformer)),
        "vae": autoencoders.flux2(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


def klein(folder: Path) -> None:
    tokenizer = tokenizers.qwen()
    Flux2KleinPipeline(
        **_parts2(guidance_embeds=False),
        text_encoder=encoders.qwen3(tokenizer, Qwen3ForCausalLM),
        tokenizer=tokenizer,
    ).save_pretrained(folder)


TEXT = {"max_sequence_length": 48}
CONTROL = TEXT | {"control_image": picture(32, turned=True)}
KONTEXT = TEXT | {"max_area": 32 * 32, "_auto_resize": False}
TEXT2 = {"max_sequence_length": 48, "text_encoder_out_layers": [1]}

FAMILIES = [
    Family("flux", plain, size=32, arguments=TEXT),
    Family("flux-control", control, size=32, arguments=CONTROL),
    Family("flux-controlnet", controlnet, size=32, arguments=CONTROL),
    Family("flux-kontext", kontext, size=32, arguments=KONTEXT),
    # It takes no smaller images.
    Family("flux2-klein", klein, size=64, arguments=TEXT2, tolerance=3e-3),
]

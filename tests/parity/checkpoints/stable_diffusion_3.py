"""Stable Diffusion 3: plain, PAG, ControlNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
)

from . import autoencoders, encoders, tokenizers
from .family import Family, picture
from .stable_diffusion import PAG
from .weights import filled

SHAPE = {
    "sample_size": 16,
    "patch_size": 1,
    # Inpainting counts on 16.
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 64,
}


def parts() -> dict[str, Any]:
    clip, t5 = tokenizers.clip(), tokenizers.t5()
    return {
        "transformer": filled(SD3Transformer2DModel(**SHAPE)),
        "vae": autoencoders.shifted(16),
        "text_encoder": encoders.clip_text_with_projection(clip),
        "text_encoder_2": encoders.clip_text_with_projection(clip),
        "text_encoder_3": encoders.t5(t5),
        "tokenizer": clip,
        "tokenizer_2": clip,
        "tokenizer_3": t5,
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


def plain(folder: Path) -> None:
    StableDiffusion3Pipeline(**parts()).save_pretrained(folder)


def controlnet(folder: Path) -> None:
    net = filled(SD3ControlNetModel(**SHAPE | {"num_layers": 1}))
    StableDiffusion3ControlNetPipeline(**parts(), controlnet=net).save_pretrained(folder)


def controlnet_inpainting(folder: Path) -> None:
    net = filled(SD3ControlNetModel(**SHAPE | {"num_layers": 1}, extra_conditioning_channels=1))
    StableDiffusion3ControlNetInpaintingPipeline(**parts(), controlnet=net).save_pretrained(folder)


CONTROL = {"control_image": picture(32, turned=True)}

FAMILIES = [
    Family("stable-diffusion-3", plain, size=32),
    # The default layers of PAG are those of models with more layers.
    Family("stable-diffusion-3-pag", plain, load=PAG | {"pag_applied_layers": "blocks.1"}, size=32),
    Family("stable-diffusion-3-controlnet", controlnet, tasks=("text-to-image",), size=32, arguments=CONTROL),
    Family(
        "stable-diffusion-3-controlnet",
        controlnet_inpainting,
        "inpainting",
        tasks=("inpainting",),
        size=32,
        arguments={"control_image": picture(32), "control_mask": picture(32, turned=True).convert("L")},
    ),
]

"""Stable Diffusion XL: base, refiner, inpainting, ControlNets, PAG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    MultiControlNetModel,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from tests.checkpoints import ddim, tiny_unet, tiny_vae

from . import encoders, tokenizers
from .family import Family, picture
from .stable_diffusion import CONTROL, CONTROLS, PAG
from .weights import filled

# What a ControlNet takes over from its UNet.
SHAPE = (
    "in_channels",
    "down_block_types",
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "cross_attention_dim",
    "attention_head_dim",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)


def parts(**unet: Any) -> dict[str, Any]:
    tokenizer = tokenizers.clip()
    usual = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + encoders.WIDTH,
        "cross_attention_dim": 2 * encoders.WIDTH,
    }
    return {
        "unet": tiny_unet(**(usual | unet)),
        "vae": tiny_vae(force_upcast=True),
        "text_encoder": encoders.clip_text(tokenizer),
        "text_encoder_2": encoders.clip_text_with_projection(tokenizer),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "scheduler": ddim(),
    }


def base(folder: Path) -> None:
    StableDiffusionXLPipeline(**parts(), add_watermarker=False).save_pretrained(folder)


def refiner(folder: Path) -> None:
    made = parts(projection_class_embeddings_input_dim=5 * 8 + encoders.WIDTH, cross_attention_dim=encoders.WIDTH) | {
        "text_encoder": None,
        "tokenizer": None,
    }
    StableDiffusionXLImg2ImgPipeline(**made, requires_aesthetics_score=True).save_pretrained(folder)


def inpainting(folder: Path) -> None:
    StableDiffusionXLInpaintPipeline(**parts(in_channels=9)).save_pretrained(folder)


def controlnet(folder: Path) -> None:
    made = parts()
    net = filled(ControlNetModel.from_unet(made["unet"]))
    StableDiffusionXLControlNetPipeline(**made, controlnet=net).save_pretrained(folder)


def controlnets(folder: Path) -> None:
    made = parts()
    nets = MultiControlNetModel([filled(ControlNetModel.from_unet(made["unet"])) for _ in range(2)])
    StableDiffusionXLControlNetPipeline(**made, controlnet=nets).save_pretrained(folder)


def union(folder: Path) -> None:
    made = parts()
    shape = {name: made["unet"].config[name] for name in SHAPE}
    # The embedding of the kinds of condition has the width of the UNet's first block.
    net = ControlNetUnionModel(
        **shape,
        conditioning_embedding_out_channels=(16, 16, 16, 16),
        num_trans_channel=32,
        num_proj_channel=32,
        num_trans_head=4,
    )
    StableDiffusionXLControlNetUnionPipeline(**made, controlnet=filled(net)).save_pretrained(folder)


UNION = {
    task: {"control_image": [picture(turned=True)], "control_mode": [1]}
    for task in ("text-to-image", "image-to-image", "inpainting")
}

FAMILIES = [
    Family("stable-diffusion-xl", base),
    Family("stable-diffusion-xl", refiner, "refiner", tasks=("image-to-image", "inpainting")),
    Family("stable-diffusion-xl", inpainting, "9-channel inpainting", tasks=("inpainting",)),
    Family("stable-diffusion-xl-controlnet", controlnet, by_task=CONTROL),
    Family("stable-diffusion-xl-controlnet", controlnets, "two ControlNets", by_task=CONTROLS),
    Family("stable-diffusion-xl-controlnet-union", union, by_task=UNION),
    Family("stable-diffusion-xl-pag", base, load=PAG),
    Family("stable-diffusion-xl-controlnet-pag", controlnet, load=PAG, by_task=CONTROL),
]

"""Stable Diffusion with all that goes on it: ControlNets, PAG, latent consistency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    ControlNetModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

from tests.checkpoints import ddim, tiny_unet, tiny_vae

from . import encoders, tokenizers
from .family import Family, picture
from .weights import filled


def parts(**unet: Any) -> dict[str, Any]:
    """What all pipelines of the family are made of."""
    tokenizer = tokenizers.clip()
    return {
        "unet": tiny_unet(**unet),
        "vae": tiny_vae(),
        "text_encoder": encoders.clip_text(tokenizer),
        "tokenizer": tokenizer,
        "scheduler": ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def plain(folder: Path) -> None:
    StableDiffusionPipeline(**parts()).save_pretrained(folder)


def inpainting(folder: Path) -> None:
    StableDiffusionInpaintPipeline(**parts(in_channels=9)).save_pretrained(folder)


def controlnet(folder: Path) -> None:
    made = parts()
    net = filled(ControlNetModel.from_unet(made["unet"]))
    StableDiffusionControlNetPipeline(**made, controlnet=net).save_pretrained(folder)


def controlnets(folder: Path) -> None:
    made = parts()
    nets = MultiControlNetModel([filled(ControlNetModel.from_unet(made["unet"])) for _ in range(2)])
    StableDiffusionControlNetPipeline(**made, controlnet=nets).save_pretrained(folder)


def latent_consistency(folder: Path) -> None:
    made = parts(time_cond_proj_dim=32) | {"scheduler": LCMScheduler.from_config(ddim().config)}
    LatentConsistencyModelPipeline(**made).save_pretrained(folder)


# The condition is `image` where there is no other image, and `control_image` beside one.
CONTROL = {
    "text-to-image": {"image": picture(turned=True)},
    "image-to-image": {"control_image": picture(turned=True)},
    "inpainting": {"control_image": picture(turned=True)},
}
CONTROLS = {task: {name: [picture(), image]} for task, each in CONTROL.items() for name, image in each.items()}
PAG = {"enable_pag": True}

FAMILIES = [
    Family("stable-diffusion", plain),
    Family("stable-diffusion", inpainting, "9-channel inpainting", tasks=("inpainting",)),
    Family("stable-diffusion-controlnet", controlnet, by_task=CONTROL),
    Family("stable-diffusion-controlnet", controlnets, "two ControlNets", by_task=CONTROLS),
    Family("stable-diffusion-pag", plain, load=PAG),
    Family("stable-diffusion-controlnet-pag", controlnet, load=PAG, by_task=CONTROL),
    Family("lcm", latent_consistency),
]

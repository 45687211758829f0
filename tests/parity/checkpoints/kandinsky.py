"""Kandinsky 2.1, 2.2 and 3. The first two are decoders whose README names the prior that goes before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    Kandinsky3Pipeline,
    Kandinsky3UNet,
    KandinskyInpaintPipeline,
    KandinskyPipeline,
    KandinskyPriorPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

from . import encoders, tokenizers
from .family import Family


def _unet(conditions: str, channels: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        in_channels=channels,
        out_channels=8,
        addition_embed_type=conditions,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        encoder_hid_dim=encoders.WIDTH,
        encoder_hid_dim_type=f"{conditions}_proj",
        cross_attention_dim=encoders.WIDTH,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )


def _movq() -> VQModel:
    return VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def _prior(pipeline_class: Any, folder: Path) -> None:
    tokenizer = tokenizers.clip()
    prior = PriorTransformer(num_attention_heads=2, attention_head_dim=12, embedding_dim=encoders.WIDTH, num_layers=1)
    # Zero makes every embedding the same.
    prior.clip_std = torch.nn.Parameter(torch.ones_like(prior.clip_std))
    pipeline_class(
        prior=prior,
        image_encoder=encoders.clip_vision(),
        image_processor=encoders.clip_image_processor(),
        text_encoder=encoders.clip_text_with_projection(tokenizer),
        tokenizer=tokenizer,
        scheduler=UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0),
    ).save_pretrained(folder)


def _name_prior(folder: Path, prior: Path) -> None:
    (folder / "README.md").write_text(f"---\nprior:\n- {prior}\n---\n")


def kandinsky(folder: Path, *, pipeline_class: Any = KandinskyPipeline, channels: int = 4) -> None:
    tokenizer, prior = tokenizers.xlm_roberta(), folder.with_name(f"{folder.name}-prior")
    config = MCLIPConfig(
        numDims=encoders.WIDTH,
        transformerDimensions=encoders.WIDTH,
        hidden_size=encoders.WIDTH,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
    )
    pipeline_class(
        text_encoder=MultilingualCLIP(config).eval(),
        tokenizer=tokenizer,
        unet=_unet("text_image", channels),
        scheduler=_ddim(),
        movq=_movq(),
    ).save_pretrained(folder)
    _prior(KandinskyPriorPipeline, prior)
    _name_prior(folder, prior)


def kandinsky22(folder: Path, *, pipeline_class: Any = KandinskyV22Pipeline, channels: int = 4) -> None:
    prior = folder.with_name(f"{folder.name}-prior")
    pipeline_class(unet=_unet("image", channels), scheduler=_ddim(), movq=_movq()).save_pretrained(folder)
    _prior(KandinskyV22PriorPipeline, prior)
    _name_prior(folder, prior)


def kandinsky_inpainting(folder: Path) -> None:
    kandinsky(folder, pipeline_class=KandinskyInpaintPipeline, channels=9)


def kandinsky22_inpainting(folder: Path) -> None:
    kandinsky22(folder, pipeline_class=KandinskyV22InpaintPipeline, channels=9)


def kandinsky3(folder: Path) -> None:
    tokenizer = tokenizers.t5()
    Kandinsky3Pipeline(
        unet=Kandinsky3UNet(
            in_channels=4,
            time_embedding_dim=16,
            groups=2,
            attention_head_dim=4,
            layers_per_block=3,
            block_out_channels=(32, 64),
            cross_attention_dim=4,
            encoder_hid_dim=encoders.WIDTH,
        ),
        scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        movq=_movq(),
        text_encoder=encoders.t5(tokenizer),
        tokenizer=tokenizer,
    ).save_pretrained(folder)


# Pixels come from a decoder whose float range is wide.
WIDE = 3e-3

PRIOR = {"prior_num_inference_steps": 2}
WHOLE = ("text-to-image", "image-to-image")

FAMILIES = [
    Family("kandinsky", kandinsky, tasks=WHOLE, arguments=PRIOR, tolerance=WIDE),
    Family("kandinsky", kandinsky_inpainting, "inpainting", ("inpainting",), arguments=PRIOR, tolerance=WIDE),
    Family("kandinsky22", kandinsky22, tasks=WHOLE, arguments=PRIOR, tolerance=WIDE),
    Family("kandinsky22", kandinsky22_inpainting, "inpainting", ("inpainting",), arguments=PRIOR, tolerance=WIDE),
    Family("kandinsky3", kandinsky3, tolerance=WIDE),
]

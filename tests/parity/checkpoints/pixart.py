"""PixArt alpha and sigma, HunyuanDiT, AuraFlow, Chroma: transformers that read T5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from tests.checkpoints import tiny_vae

from . import autoencoders, encoders, tokenizers
from .family import Family
from .stable_diffusion import PAG
from .weights import filled


def _pixart(pipeline_class: Any, folder: Path) -> None:
    tokenizer = tokenizers.t5()
    pipeline_class(
        transformer=filled(
            PixArtTransformer2DModel(
                sample_size=16,
                num_layers=2,
                patch_size=2,
                attention_head_dim=8,
                num_attention_heads=3,
                caption_channels=32,
                in_channels=4,
                cross_attention_dim=24,
                out_channels=8,
                use_additional_conditions=False,
            )
        ),
        vae=autoencoders.kl(),
        scheduler=DDIMScheduler(),
        text_encoder=encoders.t5(tokenizer),
        tokenizer=tokenizer,
    ).save_pretrained(folder)


def alpha(folder: Path) -> None:
    _pixart(PixArtAlphaPipeline, folder)


def sigma(folder: Path) -> None:
    _pixart(PixArtSigmaPipeline, folder)


def hunyuan(folder: Path) -> None:
    bert, t5 = tokenizers.bert(), tokenizers.t5()
    HunyuanDiTPipeline(
        transformer=filled(
            HunyuanDiT2DModel(
                sample_size=8,
                num_layers=2,
                patch_size=2,
                attention_head_dim=8,
                num_attention_heads=3,
                in_channels=4,
                cross_attention_dim=32,
                cross_attention_dim_t5=32,
                pooled_projection_dim=16,
                hidden_size=24,
                activation_fn="gelu-approximate",
            )
        ),
        vae=tiny_vae(),
        scheduler=DDPMScheduler(),
        text_encoder=encoders.bert(bert),
        tokenizer=bert,
        text_encoder_2=encoders.t5(t5),
        tokenizer_2=t5,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def auraflow(folder: Path) -> None:
    tokenizer = tokenizers.t5()
    AuraFlowPipeline(
        transformer=filled(
            AuraFlowTransformer2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=4,
                num_mmdit_layers=1,
                num_single_dit_layers=1,
                attention_head_dim=8,
                num_attention_heads=4,
                caption_projection_dim=32,
                joint_attention_dim=32,
                out_channels=4,
                pos_embed_max_size=256,
            )
        ),
        vae=autoencoders.kl(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=encoders.umt5(tokenizer),
        tokenizer=tokenizer,
    ).save_pretrained(folder)


def chroma(folder: Path) -> None:
    tokenizer = tokenizers.t5()
    ChromaPipeline(
        transformer=filled(
            ChromaTransformer2DModel(
                patch_size=1,
                in_channels=4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                axes_dims_rope=[4, 4, 8],
                approximator_hidden_dim=32,
                approximator_layers=1,
                approximator_num_channels=16,
            )
        ),
        vae=autoencoders.shifted(1),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=encoders.t5(tokenizer),
        tokenizer=tokenizer,
    ).save_pretrained(folder)


EXACT = {"use_resolution_binning": False}
# The default layers of PAG are those of models with more layers.
BLOCKS = PAG | {"pag_applied_layers": ["blocks.1"]}

FAMILIES = [
    Family("pixart-alpha", alpha, size=32, arguments=EXACT),
    Family("pixart-sigma", sigma, size=32, arguments=EXACT),
    Family("pixart-sigma-pag", sigma, load=BLOCKS, size=32, arguments=EXACT),
    Family("hunyuan", hunyuan, arguments=EXACT),
    Family("hunyuan-pag", hunyuan, load=BLOCKS, arguments=EXACT),
    Family("auraflow", auraflow, size=32),
    Family("chroma", chroma, size=32, arguments={"max_sequence_length": 48}),
]

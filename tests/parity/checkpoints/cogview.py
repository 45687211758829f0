"""CogView 3 and 4, GLM-Image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4ControlPipeline,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)

from tests.checkpoints import tiny_vae

from . import encoders, tokenizers
from .family import Family, picture
from .weights import filled


def cogview3(folder: Path) -> None:
    tokenizer = tokenizers.t5()
    CogView3PlusPipeline(
        transformer=filled(
            CogView3PlusTransformer2DModel(
                patch_size=2,
                in_channels=4,
                num_layers=1,
                attention_head_dim=4,
                num_attention_heads=2,
                out_channels=4,
                text_embed_dim=encoders.WIDTH,
                time_embed_dim=8,
                condition_dim=2,
                pos_embed_max_size=8,
                sample_size=8,
            )
        ),
        vae=tiny_vae(),
        scheduler=CogVideoXDDIMScheduler(),
        text_encoder=encoders.t5(tokenizer),
        tokenizer=tokenizer,
    ).save_pretrained(folder)


def _cogview4(pipeline_class: Any, folder: Path, channels: int) -> None:
    tokenizer = tokenizers.qwen()
    pipeline_class(
        transformer=filled(
            CogView4Transformer2DModel(
                patch_size=2,
                in_channels=channels,
                num_layers=2,
                attention_head_dim=4,
                num_attention_heads=4,
                out_channels=4,
                text_embed_dim=encoders.WIDTH,
                time_embed_dim=8,
                condition_dim=4,
            )
        ),
        vae=tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_shift=0.25,
            max_shift=0.75,
            base_image_seq_len=256,
            use_dynamic_shifting=True,
            time_shift_type="linear",
        ),
        text_encoder=encoders.glm(tokenizer),
        tokenizer=tokenizer,
    ).save_pretrained(folder)


def cogview4(folder: Path) -> None:
    _cogview4(CogView4Pipeline, folder, 4)


def cogview4_control(folder: Path) -> None:
    _cogview4(CogView4ControlPipeline, folder, 8)


TEXT = {"max_sequence_length": 16, "negative_prompt": "a dog"}

FAMILIES = [
    Family("cogview3", cogview3, arguments=TEXT),
    Family("cogview4", cogview4, arguments=TEXT),
    Family("cogview4-control", cogview4_control, arguments=TEXT | {"control_image": picture(turned=True)}),
]

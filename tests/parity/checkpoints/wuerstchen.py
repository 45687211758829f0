"""Wuerstchen and Stable Cascade: combined pipelines of a prior and a decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import (
    DDPMWuerstchenScheduler,
    DiffusionPipeline,
    StableCascadeCombinedPipeline,
    StableCascadeUNet,
    WuerstchenCombinedPipeline,
)
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior

from . import encoders, tokenizers
from .family import Family
from .weights import filled

OLD = {kind.__name__: kind.__module__ for kind in (PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior)}


def _save(pipeline: DiffusionPipeline, folder: Path) -> None:
    """diffusers 0.42 writes that these classes are among its own names, and then does not find them there."""
    pipeline.save_pretrained(folder)
    index = folder / "model_index.json"
    entries: dict[str, Any] = json.loads(index.read_text())
    for role, entry in entries.items():
        if isinstance(entry, list) and entry[1] in OLD:
            entries[role] = [OLD[entry[1]], entry[1]]
    index.write_text(json.dumps(entries))


def _decoder() -> dict[str, Any]:
    tokenizer = tokenizers.clip()
    return {
        "vqgan": filled(PaellaVQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=4)),
        "tokenizer": tokenizer,
        "scheduler": DDPMWuerstchenScheduler(),
        "prior_tokenizer": tokenizer,
        "prior_scheduler": DDPMWuerstchenScheduler(),
    }


def wuerstchen(folder: Path) -> None:
    tokenizer = tokenizers.clip()
    pipeline = WuerstchenCombinedPipeline(
        **_decoder(),
        decoder=filled(
            WuerstchenDiffNeXt(
                c_cond=encoders.WIDTH,
                c_hidden=[32],
                nhead=[-1],
                blocks=[1],
                level_config=["CT"],
                clip_embd=encoders.WIDTH,
                inject_effnet=[False],
            )
        ),
        text_encoder=encoders.clip_text(tokenizer),
        prior_text_encoder=encoders.clip_text(tokenizer),
        prior_prior=filled(WuerstchenPrior(c_in=2, c=8, depth=1, c_cond=encoders.WIDTH, c_r=8, nhead=2)),
    )
    _save(pipeline, folder)


def _unet(**options: Any) -> StableCascadeUNet:
    usual: dict[str, Any] = {
        "conditioning_dim": 16,
        "block_out_channels": (16, 16),
        "num_attention_heads": (2, 2),
        "down_num_layers_per_block": (1, 1),
        "up_num_layers_per_block": (1, 1),
        "clip_text_pooled_in_channels": encoders.WIDTH,
        "switch_level": (False,),
    }
    return filled(StableCascadeUNet(**(usual | options)))


def cascade(folder: Path) -> None:
    tokenizer = tokenizers.clip()
    pipeline = StableCascadeCombinedPipeline(
        **_decoder(),
        decoder=_unet(in_channels=4, out_channels=4, patch_size=2, effnet_in_channels=16),
        text_encoder=encoders.clip_text_with_projection(tokenizer),
        prior_text_encoder=encoders.clip_text_with_projection(tokenizer),
        prior_prior=_unet(clip_text_in_channels=encoders.WIDTH, clip_image_in_channels=encoders.WIDTH),
        prior_feature_extractor=encoders.clip_image_processor(),
        prior_image_encoder=encoders.clip_vision(),
    )
    _save(pipeline, folder)


STEPS = {"prior_num_inference_steps": 2}

FAMILIES = [
    Family("wuerstchen", wuerstchen, size=128, arguments=STEPS),
    Family("cascade", cascade, size=128, arguments=STEPS),
]

"""Pipelines that make videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeliosPipeline,
    HeliosPyramidPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from . import encoders, tokenizers
from .family import Family, picture
from .weights import filled

SHAPE = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": encoders.WIDTH,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}


def _wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def _parts(transformer: Any, scheduler: Any) -> dict[str, Any]:
    tokenizer = tokenizers.t5()
    return {
        "transformer": filled(transformer),
        "vae": _wan_vae(),
        "scheduler": scheduler,
        "text_encoder": encoders.t5(tokenizer),
        "tokenizer": tokenizer,
    }


def wan(folder: Path) -> None:
    WanPipeline(
        **_parts(WanTransformer3DModel(**SHAPE), UniPCMultistepScheduler(flow_shift=3.0)), transformer_2=None
    ).save_pretrained(folder)


def wan_image(folder: Path) -> None:
    transformer = WanTransformer3DModel(**SHAPE | {"in_channels": 36}, image_dim=4)
    WanImageToVideoPipeline(
        **_parts(transformer, FlowMatchEulerDiscreteScheduler(shift=7.0)),
        transformer_2=None,
        image_encoder=encoders.clip_vision(
            hidden_size=4, projection_dim=4, num_attention_heads=2, intermediate_size=16
        ),
        image_processor=encoders.clip_image_processor(),
    ).save_pretrained(folder)


def anyflow(folder: Path) -> None:
    transformer = AnyFlowTransformer3DModel(**SHAPE, gate_value=0.25, deltatime_type="r")
    AnyFlowPipeline(**_parts(transformer, FlowMapEulerDiscreteScheduler(shift=5.0))).save_pretrained(folder)


def anyflow_far(folder: Path) -> None:
    transformer = AnyFlowFARTransformer3DModel(
        **SHAPE,
        compressed_patch_size=(1, 4, 4),
        full_chunk_limit=3,
        gate_value=0.25,
        deltatime_type="r",
        chunk_partition=(1, 1, 1),
    )
    AnyFlowFARPipeline(**_parts(transformer, FlowMapEulerDiscreteScheduler(shift=5.0))).save_pretrained(folder)


def _helios(pipeline_class: Any, scheduler: Any, folder: Path) -> None:
    shape = {name: value for name, value in SHAPE.items() if name != "rope_max_seq_len"}
    transformer = HeliosTransformer3DModel(
        **shape,
        rope_dim=(4, 4, 4),
        has_multi_term_memory_patch=True,
        guidance_cross_attn=True,
        zero_history_timestep=True,
        is_amplify_history=False,
    )
    pipeline_class(**_parts(transformer, scheduler)).save_pretrained(folder)


def helios(folder: Path) -> None:
    _helios(HeliosPipeline, HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True), folder)


def helios_pyramid(folder: Path) -> None:
    _helios(HeliosPyramidPipeline, HeliosScheduler(use_dynamic_shifting=True), folder)


def ltx(folder: Path) -> None:
    tokenizer = tokenizers.t5()
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    LTXPipeline(
        transformer=filled(
            LTXVideoTransformer3DModel(
                in_channels=8,
                out_channels=8,
                num_attention_heads=4,
                attention_head_dim=8,
                cross_attention_dim=32,
                num_layers=1,
                caption_channels=encoders.WIDTH,
            )
        ),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=encoders.t5(tokenizer),
        tokenizer=tokenizer,
    ).save_pretrained(folder)


FRAMES = 9
SHORT = {"num_frames": FRAMES, "max_sequence_length": 16}
# As AnyFlow takes it: the first frames, from which it goes on.
FIRST = torch.linspace(0, 1, 5 * 3 * 16 * 16).reshape(1, 5, 3, 16, 16)
MOVING = {"video": [picture(16, turned=bool(index % 2)) for index in range(FRAMES)]}
GUIDED = {"guidance_scale": 3.0}

FAMILIES = [
    Family(
        "wan",
        wan,
        size=16,
        arguments={"max_sequence_length": 16} | GUIDED,
        by_task={"text-to-video": SHORT, "video-to-video": MOVING},
    ),
    Family("wan-i2v", wan_image, size=16, arguments=SHORT | GUIDED),
    Family("anyflow", anyflow, size=16, arguments=SHORT),
    Family(
        "anyflow-far",
        anyflow_far,
        size=16,
        arguments=SHORT,
        by_task={"image-to-video": {"video": FIRST[:, :1]}, "video-to-video": {"video": FIRST}},
    ),
    Family("ltx", ltx, size=32, arguments=SHORT),
    Family("helios", helios, size=16, arguments=SHORT),
    Family("helios-pyramid", helios_pyramid, size=64, arguments=SHORT),
]

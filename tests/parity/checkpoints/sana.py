"""Sana, Lumina and PRX: transformers that read Gemma."""

from __future__ import annotations

from pathlib import Path

from diffusers import (
    AutoencoderDC,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    PRXPipeline,
    PRXTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from transformers import T5GemmaConfig, T5GemmaModuleConfig
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from . import autoencoders, encoders, tokenizers
from .family import Family
from .stable_diffusion import PAG
from .weights import filled


def sana(folder: Path) -> None:
    tokenizer = tokenizers.gemma()
    SanaPipeline(
        transformer=filled(
            SanaTransformer2DModel(
                patch_size=1,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                num_attention_heads=2,
                attention_head_dim=4,
                num_cross_attention_heads=2,
                cross_attention_head_dim=4,
                cross_attention_dim=8,
                caption_channels=encoders.WIDTH,
                sample_size=32,
            )
        ),
        vae=AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=encoders.gemma2(tokenizer),
        tokenizer=tokenizer,
    ).save_pretrained(folder)


def lumina(folder: Path) -> None:
    tokenizer = tokenizers.gemma()
    LuminaPipeline(
        transformer=filled(
            LuminaNextDiT2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=4,
                hidden_size=24,
                num_layers=2,
                num_attention_heads=3,
                num_kv_heads=1,
                multiple_of=16,
                norm_eps=1e-5,
                learn_sigma=True,
                qk_norm=True,
                cross_attention_dim=encoders.WIDTH,
                scaling_factor=1.0,
            )
        ),
        vae=autoencoders.kl(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=encoders.gemma(tokenizer),
        tokenizer=tokenizer,
    ).save_pretrained(folder)


def lumina2(folder: Path) -> None:
    tokenizer = tokenizers.gemma()
    Lumina2Pipeline(
        transformer=filled(
            Lumina2Transformer2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=4,
                hidden_size=8,
                num_layers=2,
                num_attention_heads=1,
                num_kv_heads=1,
                multiple_of=16,
                norm_eps=1e-5,
                scaling_factor=1.0,
                axes_dim_rope=[4, 2, 2],
                cap_feat_dim=encoders.WIDTH,
            )
        ),
        vae=autoencoders.shifted(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=encoders.gemma2(tokenizer),
        tokenizer=tokenizer,
    ).save_pretrained(folder)


def prx(folder: Path) -> None:
    tokenizer = tokenizers.gemma(64)
    module = T5GemmaModuleConfig(
        **encoders.decoder(tokenizer),
        head_dim=8,
        max_position_embeddings=64,
        layer_types=["full_attention"] * 2,
        dropout_rate=0.0,
    ).to_dict()
    config = T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False)
    text_encoder = T5GemmaEncoder(config.encoder).eval()
    # What is written down is the configuration of the whole model, of which diffusers takes the encoder's.
    text_encoder.config = config
    PRXPipeline(
        transformer=filled(
            PRXTransformer2DModel(
                patch_size=1,
                in_channels=4,
                context_in_dim=encoders.WIDTH,
                hidden_size=8,
                mlp_ratio=2.0,
                num_heads=2,
                depth=1,
                axes_dim=[2, 2],
            )
        ),
        vae=autoencoders.shifted(shift_factor=0.0),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    ).save_pretrained(folder)


EXACT = {"use_resolution_binning": False}
SANA = EXACT | {"max_sequence_length": 16, "complex_human_instruction": None}

FAMILIES = [
    Family("sana", sana, size=32, arguments=SANA),
    # Gemma returns what it remembers beside what it says, and that cannot be told apart by samples; the rest is PAG's.
    Family("sana-pag", sana, load=PAG | {"pag_applied_layers": ["blocks.1"]}, size=32, arguments=SANA),
    # An empty prompt, whose features are averaged over no token, would be no number.
    Family("lumina", lumina, arguments={"negative_prompt": "a dog"}),
    Family("lumina2", lumina2),
    Family("prx", prx, size=32, arguments=EXACT),
]

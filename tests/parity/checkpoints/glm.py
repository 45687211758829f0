"""GLM-Image: a language model draws what is to be seen as tokens, and a transformer makes an image of them."""

from __future__ import annotations

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
from transformers import (
    ByT5Tokenizer,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageImageProcessor,
    GlmImageProcessor,
    Qwen2Tokenizer,
)

from . import autoencoders, encoders, tokenizers
from .family import Family
from .weights import filled


def _language_model(tokenizer: Qwen2Tokenizer, size: int) -> GlmImageForConditionalGeneration:
    text = encoders.decoder(tokenizer) | {
        "vocab_size": size,
        # What it may say are tokens of images.
        "vision_vocab_size": len(tokenizer),
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [1, 1, 2],
            "partial_rotary_factor": 1.0,
            "rope_theta": 1e4,
        },
    }
    config = GlmImageConfig(
        text_config=text,
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "image_size": 64},
        vq_config={"embed_dim": 8, "num_embeddings": 8, "latent_channels": 16},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        image_start_token_id=tokenizer.bos_token_id,
        image_end_token_id=size - 1,
    )
    model = GlmImageForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


def glm_image(folder: Path) -> None:
    tokenizer, letters = tokenizers.glm_image(), ByT5Tokenizer()
    size = len(tokenizer) + 1
    GlmImagePipeline(
        tokenizer=letters,
        processor=GlmImageProcessor(GlmImageImageProcessor(), tokenizer, chat_template=tokenizer.chat_template),
        text_encoder=encoders.t5(letters),
        vision_language_encoder=_language_model(tokenizer, size),
        vae=autoencoders.kl(
            16,
            block_out_channels=(16,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latents_mean=[0.0] * 16,
            latents_std=[1.0] * 16,
        ),
        transformer=filled(
            GlmImageTransformer2DModel(
                num_layers=1,
                attention_head_dim=8,
                num_attention_heads=4,
                text_embed_dim=encoders.WIDTH,
                time_embed_dim=16,
                condition_dim=8,
                prior_vq_quantizer_codebook_size=size,
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)


FAMILIES = [Family("glm_image", glm_image)]

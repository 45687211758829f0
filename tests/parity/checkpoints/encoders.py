"""Text and image encoders of a few thousand weights."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WIDTH = 32


def clip_text(tokenizer: Any, **options: Any) -> CLIPTextModel:
    return CLIPTextModel(_clip_config(tokenizer, options))


def clip_text_with_projection(tokenizer: Any, **options: Any) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(_clip_config(tokenizer, options))


def _clip_config(tokenizer: Any, options: dict[str, Any]) -> CLIPTextConfig:
    usual: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "projection_dim": WIDTH,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**(usual | options))


def clip_vision(**options: Any) -> CLIPVisionModelWithProjection:
    usual: dict[str, Any] = {
        "hidden_size": WIDTH,
        "projection_dim": WIDTH,
        "intermediate_size": 37,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**(usual | options)))


def clip_image_processor(size: int = 32) -> CLIPImageProcessor:
    return CLIPImageProcessor(crop_size=size, size=size)


def t5(tokenizer: Any) -> T5EncoderModel:
    return T5EncoderModel(T5Config(**_T5, vocab_size=len(tokenizer))).eval()


def umt5(tokenizer: Any) -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(**_T5, vocab_size=len(tokenizer))).eval()


_T5 = {"d_model": WIDTH, "d_ff": 37, "d_kv": 8, "num_heads": 4, "num_layers": 2}

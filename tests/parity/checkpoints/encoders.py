"""Text and image encoders of a few thousand weights."""

from __future__ import annotations

from typing import Any

from transformers import (
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaConfig,
    GemmaForCausalLM,
    GlmConfig,
    GlmModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
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


def bert(tokenizer: Any) -> BertModel:
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
    )
    return BertModel(config).eval()


def gemma(tokenizer: Any) -> GemmaForCausalLM:
    return GemmaForCausalLM(GemmaConfig(**decoder(tokenizer), head_dim=8)).eval()


def gemma2(tokenizer: Any) -> Gemma2Model:
    return Gemma2Model(Gemma2Config(**decoder(tokenizer), head_dim=8)).eval()


def glm(tokenizer: Any) -> GlmModel:
    return GlmModel(GlmConfig(**decoder(tokenizer), head_dim=8, pad_token_id=tokenizer.pad_token_id)).eval()


def qwen3(tokenizer: Any, kind: type[Any] = Qwen3Model) -> Any:
    return kind(Qwen3Config(**decoder(tokenizer), head_dim=8, max_position_embeddings=1024)).eval()


def qwen25_vl(tokenizer: Any) -> Qwen2_5_VLForConditionalGeneration:
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    marks = {
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
    }
    config = Qwen2_5_VLConfig(
        text_config=decoder(tokenizer) | {"rope_scaling": _MROPE, "rope_theta": 1e6, "max_position_embeddings": 2048},
        vision_config=vision,
        **{name: tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()},
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen3_vl(tokenizer: Any, kind: type[Any] = Qwen3VLModel, *, layers: int = 2) -> Any:
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 64,
    }
    text = decoder(tokenizer) | {"num_hidden_layers": layers, "head_dim": 8, "rope_scaling": _MROPE}
    marks = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    marks |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    numbers = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    return kind(Qwen3VLConfig(text_config=text, vision_config=vision, **numbers)).eval()


_MROPE = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}


def decoder(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 37,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
    }

"""Kolors, which reads ChatGLM."""

from __future__ import annotations

import io
from pathlib import Path

import sentencepiece
import torch
from diffusers import EulerDiscreteScheduler, KolorsPipeline
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

from tests.checkpoints import tiny_unet, tiny_vae

from . import encoders
from .family import Family
from .stable_diffusion import PAG


def _tokenizer(folder: Path) -> ChatGLMTokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a quick brown fox jumps over the lazy dog 0123456789"]),
        model_writer=model,
        model_type="char",
        vocab_size=45,
        minloglevel=2,
    )
    folder.mkdir(parents=True)
    file = folder / "tokenizer.model"
    file.write_bytes(model.getvalue())
    return ChatGLMTokenizer(str(file))


def build(folder: Path) -> None:
    tokenizer = _tokenizer(folder / "vocabulary")
    text_encoder = ChatGLMModel(
        ChatGLMConfig(
            num_layers=2,
            padded_vocab_size=128,
            hidden_size=encoders.WIDTH,
            ffn_hidden_size=37,
            kv_channels=8,
            num_attention_heads=4,
            seq_length=256,
            add_qkv_bias=True,
            multi_query_attention=True,
            original_rope=True,
        )
    )
    with torch.no_grad():
        # They start as whatever memory held.
        for parameter in text_encoder.parameters():
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1)
    KolorsPipeline(
        unet=tiny_unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + encoders.WIDTH,
            cross_attention_dim=encoders.WIDTH,
        ),
        vae=tiny_vae(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, steps_offset=1, beta_schedule="scaled_linear"
        ),
    ).save_pretrained(folder)


FAMILIES = [
    Family("kolors", build),
    # ChatGLM puts the samples second, where they are not told apart from the words; the rest is PAG's.
    Family("kolors-pag", build, load=PAG),
]

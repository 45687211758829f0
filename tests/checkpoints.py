"""Small random checkpoints that tests build themselves: a second or so each, a few megabytes, always the same."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters only, so that no vocabulary has to be fetched."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=77,
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )


def clip_text_config(size: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )


def tiny_unet(**overrides: object) -> UNet2DConditionModel:
    arguments: dict[str, object] = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 16,
    }
    return UNet2DConditionModel(**(arguments | overrides))


def tiny_vae(**overrides: object) -> AutoencoderKL:
    arguments: dict[str, object] = {
        "block_out_channels": (16, 16, 32, 32),
        "latent_channels": 4,
        "norm_num_groups": 8,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    return AutoencoderKL(**(arguments | overrides))


def controlnet(folder: Path, *, seed: int = 0) -> Path:
    """A ControlNetModel for what `stable_diffusion` makes. It is told to do something, unlike a fresh one."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(tiny_unet(), conditioning_embedding_out_channels=(8, 8, 8, 8))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    net.save_pretrained(folder)
    return folder


def ddim() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def stable_diffusion(folder: Path, *, seed: int = 0, unet: dict[str, object] | None = None) -> Path:
    """A StableDiffusionPipeline for 64×64 images. Other seeds and arguments change the UNet only."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder / "tokenizer")
    text_encoder, vae = CLIPTextModel(clip_text_config(len(tokenizer))), tiny_vae()
    torch.manual_seed(seed)
    StableDiffusionPipeline(
        unet=tiny_unet(**(unet or {})),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def stable_diffusion_xl(folder: Path) -> Path:
    """A StableDiffusionXLPipeline for 64×64 images, whose VAE has to be cast up from float16 to decode."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder / "tokenizer")
    config = clip_text_config(len(tokenizer))
    config.projection_dim = 32
    StableDiffusionXLPipeline(
        unet=tiny_unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
            cross_attention_dim=64,
            transformer_layers_per_block=1,
        ),
        vae=tiny_vae(force_upcast=True),
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=ddim(),
    ).save_pretrained(folder)
    return folder

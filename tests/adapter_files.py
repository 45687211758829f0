"""Small random adapters that tests build themselves, under the key names that diffusers and peft write."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
TEXT_ATTENTION = (".q_proj", ".k_proj", ".v_proj", ".out_proj")


def lora(
    path: Path, *, seed: int = 0, rank: int = 2, size: float = 0.3, names: Iterable[str] = (), **parts: nn.Module
) -> Path:
    """A LoRA for the attention layers of `parts`, by role. `names` are endings of further layers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for role, module in parts.items():
        endings = (*ATTENTION, *names) if hasattr(module, "config_name") else (*TEXT_ATTENTION, *names)
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear) and name.endswith(endings):
                down = torch.randn(rank, layer.in_features, generator=generator)
                up = torch.randn(layer.out_features, rank, generator=generator)
                tensors[f"{role}.{name}.lora_A.weight"] = size * down
                tensors[f"{role}.{name}.lora_B.weight"] = size * up
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def textual_inversion(path: Path, token: str, *, width: int = 32, vectors: int = 1, seed: int = 0) -> Path:
    """Learned embeddings of one token."""
    tensor = torch.randn(vectors, width, generator=torch.Generator().manual_seed(seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({token: tensor if vectors > 1 else tensor[0]}, path)
    return path


def ip_adapter(folder: Path, unet: UNet2DConditionModel, *, seed: int = 0, width: int = 32) -> Path:
    """An IP-Adapter with its image encoder beside it, for images of 32×32 pixels."""
    generator = torch.Generator().manual_seed(seed)
    cross = unet.config.cross_attention_dim
    tensors = {
        "image_proj.proj.weight": torch.randn(cross * 4, width, generator=generator),
        "image_proj.proj.bias": torch.randn(cross * 4, generator=generator),
        "image_proj.norm.weight": torch.ones(cross),
        "image_proj.norm.bias": torch.zeros(cross),
    }
    number = 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            for part in ("to_k_ip", "to_v_ip"):
                tensors[f"ip_adapter.{number}.{part}.weight"] = torch.randn(hidden, cross, generator=generator)
            number += 2
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "ip-adapter.safetensors")
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=width,
        image_size=32,
        patch_size=16,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "image_encoder")
    return folder

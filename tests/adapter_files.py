"""Small random adapters that tests build themselves, under the key names that diffusers and peft write."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

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

"""A Stable Diffusion checkpoint as one file, under the names that CompVis gave its tensors."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save(checkpoint: Path, file: Path) -> Path:
    """Writes what `checkpoints.stable_diffusion` made, all weights of it, into one file."""
    pipe = StableDiffusionPipeline.from_pretrained(checkpoint)
    per_block, blocks = pipe.unet.config.layers_per_block + 1, len(pipe.vae.config.up_block_types)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in pipe.unet.state_dict().items():
        tensors[f"model.diffusion_model.{_of_unet(name, per_block)}"] = tensor
    for name, tensor in pipe.vae.state_dict().items():
        tensors[f"first_stage_model.{_of_vae(name, blocks)}"] = tensor
    for name, tensor in pipe.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


def _of_unet(name: str, per_block: int) -> str:
    if name in (known := DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"]):
        return str(known[name])
    side, _, rest = name.partition("_block")
    block, kind, index, inner = re.fullmatch(r"s?\.?(\d*)\.?(\w+)\.(\d+)\.(.+)", rest).groups()  # type: ignore[union-attr]
    first = int(block or 0) * per_block
    if kind == "resnets":
        module, leaf = inner.rsplit(".", 1)
        inner = f"{RESNET[module]}.{leaf}"
    if side == "mid":
        return f"middle_block.{2 * int(index) if kind == 'resnets' else 1}.{inner}"
    if kind == "downsamplers":
        return f"input_blocks.{first + per_block}.0.{inner.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{first + per_block - 1}.1.{inner}"
    place = f"input_blocks.{first + int(index) + 1}" if side == "down" else f"output_blocks.{first + int(index)}"
    return f"{place}.{0 if kind == 'resnets' else 1}.{inner}"


def _of_vae(name: str, blocks: int) -> str:
    if name in (known := DIFFUSERS_TO_LDM_MAPPING["vae"]):
        return str(known[name])
    name = name.replace("conv_shortcut", "nin_shortcut").replace("mid_block.attentions.0", "mid.attn_1")
    if "mid.attn_1" in name:
        for ours, theirs in ATTENTION.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{blocks - 1 - int(match[1])}", name)
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    return name.replace(".resnets.", ".block.").replace("samplers.0.conv", "sample.conv")

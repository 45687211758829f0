"""Checkpoints as one file, under the names that those who trained such models gave their tensors."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, ZImagePipeline
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
OPEN_CLIP = {"layer_norm": "ln_", ".fc1.": ".c_fc.", ".fc2.": ".c_proj.", "self_attn.": "attn."}
JOINT = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
JOINT_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
Z_IMAGE = {
    "all_final_layer.2-1.": "final_layer.",
    "all_x_embedder.2-1.": "x_embedder.",
    ".attention.to_out.0.": ".attention.out.",
    ".attention.norm_k.": ".attention.k_norm.",
    ".attention.norm_q.": ".attention.q_norm.",
}


def save(checkpoint: Path, file: Path) -> Path:
    """Writes what `checkpoints.stable_diffusion` made, all weights of it, into one file."""
    pipe = StableDiffusionPipeline.from_pretrained(checkpoint)
    tensors = _unet(pipe) | _vae(pipe)
    for name, tensor in pipe.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    return _written(tensors, file)


def save_xl(checkpoint: Path, file: Path) -> Path:
    """A Stable Diffusion XL checkpoint, whose second text encoder is one of OpenCLIP's."""
    pipe = StableDiffusionXLPipeline.from_pretrained(checkpoint)
    tensors = _unet(pipe) | _vae(pipe)
    for name, tensor in pipe.text_encoder.state_dict().items():
        tensors[f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    for name, tensor in _open_clip(pipe.text_encoder_2.state_dict()).items():
        tensors[f"conditioner.embedders.1.model.{name}"] = tensor
    return _written(tensors, file)


def save_3(checkpoint: Path, file: Path) -> Path:
    """A Stable Diffusion 3 checkpoint, with all three text encoders."""
    pipe = StableDiffusion3Pipeline.from_pretrained(checkpoint)
    transformer = _joint(pipe.transformer.state_dict(), pipe.transformer.config.num_layers)
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in transformer.items()} | _vae(pipe)
    encoders = {"clip_l": pipe.text_encoder, "clip_g": pipe.text_encoder_2, "t5xxl": pipe.text_encoder_3}
    for encoder, module in encoders.items():
        for name, tensor in module.state_dict().items():
            # diffusers puts its own projection into the first.
            if (encoder, name) != ("clip_l", "text_projection.weight"):
                tensors[f"text_encoders.{encoder}.transformer.{name}"] = tensor
    return _written(tensors, file)


def save_z_image(checkpoint: Path, file: Path) -> Path:
    """The transformer of a Z-Image checkpoint, which is all that its files have."""
    fused: dict[str, list[torch.Tensor]] = defaultdict(list)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in ZImagePipeline.from_pretrained(checkpoint).transformer.state_dict().items():
        if query := re.fullmatch(r"(.+\.attention)\.to_[qkv]\.weight", name):
            fused[f"{query[1]}.qkv.weight"].append(tensor)
            continue
        for ours, theirs in Z_IMAGE.items():
            name = name.replace(ours, theirs)
        tensors[name] = tensor
    tensors |= {name: torch.cat(parts) for name, parts in fused.items()}
    return _written({f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}, file)


def _written(tensors: Mapping[str, torch.Tensor], file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file)
    return file


def _unet(pipe: Any) -> dict[str, torch.Tensor]:
    per_block = pipe.unet.config.layers_per_block + 1
    weights = pipe.unet.state_dict().items()
    return {f"model.diffusion_model.{_of_unet(name, per_block)}": tensor for name, tensor in weights}


def _vae(pipe: Any) -> dict[str, torch.Tensor]:
    blocks = len(pipe.vae.config.up_block_types)
    return {f"first_stage_model.{_of_vae(name, blocks)}": tensor for name, tensor in pipe.vae.state_dict().items()}


def _open_clip(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """OpenCLIP has query, key and value in one."""
    fused: dict[str, list[torch.Tensor]] = defaultdict(list)
    tensors: dict[str, torch.Tensor] = {}
    known = DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"]
    for name, tensor in weights.items():
        if name in known:
            tensors[known[name]] = tensor.T if name == "text_projection.weight" else tensor
            continue
        name = name.removeprefix("text_model.encoder.layers.")
        layer, _, rest = name.partition(".")
        if query := re.fullmatch(r"self_attn\.[qkv]_proj\.(weight|bias)", rest):
            # In the order of their names, which is not that of their rows.
            fused[f"transformer.resblocks.{layer}.attn.in_proj_{query[1]}"].append(tensor)
            continue
        for ours, theirs in OPEN_CLIP.items():
            rest = rest.replace(ours, theirs)
        tensors[f"transformer.resblocks.{layer}.{rest}"] = tensor
    return tensors | {name: torch.cat([query, key, value]) for name, (key, value, query) in fused.items()}


def _joint(weights: Mapping[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """A transformer as Stability AI names it: of each kind of query, key and value one, and shift before scale."""
    tensors: dict[str, torch.Tensor] = {}
    fused: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in weights.items():
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if block is None:
            for ours, theirs in JOINT.items():
                name = name.replace(ours, theirs)
            tensors[name] = _swapped(tensor) if name.startswith("final_layer.adaLN") else tensor
            continue
        number, module, leaf = block.groups()
        if query := re.fullmatch(r"attn\.(?:to|add)_([qkv])(_proj)?", module):
            side = "context_block" if query[2] else "x_block"
            fused[f"joint_blocks.{number}.{side}.attn.qkv.{leaf}"][query[1]] = tensor
            continue
        is_last = module == "norm1_context.linear" and int(number) == layers - 1
        tensors[f"joint_blocks.{number}.{JOINT_BLOCK[module]}.{leaf}"] = _swapped(tensor) if is_last else tensor
    return tensors | {name: torch.cat([each[kind] for kind in "qkv"]) for name, each in fused.items()}


def _swapped(tensor: torch.Tensor) -> torch.Tensor:
    scale, shift = tensor.chunk(2, dim=0)
    return torch.cat([shift, scale], dim=0)


def _of_unet(name: str, per_block: int) -> str:
    known = DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"] | DIFFUSERS_TO_LDM_MAPPING["unet"]["addition_embed_type"]
    if name in known:
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

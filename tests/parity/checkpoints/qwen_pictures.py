"""Pipelines whose Qwen sees pictures, or could: its processor needs torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageLayeredPipeline,
    QwenImageTransformer2DModel,
)
from transformers import (
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from . import autoencoders, encoders, tokenizers
from .family import Family, picture
from .qwen import SHAPE
from .weights import filled

# Pictures are seen as so few tokens, however large they are.
FEW = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}


def _processor(kind: type[Any], tokenizer: Any, **image: Any) -> Any:
    # They import torchvision.
    from transformers import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

    video = Qwen2VLVideoProcessor() if kind is Qwen2VLProcessor else Qwen3VLVideoProcessor()
    return kind(
        image_processor=Qwen2VLImageProcessor(size=FEW, **image),
        tokenizer=tokenizer,
        video_processor=video,
        chat_template=tokenizer.chat_template,
    )


def _coarse(channels: int = 4, **options: Any) -> AutoencoderKLQwenImage:
    """A latent for 32 pixels a side: these pipelines scale what they are given up to a million pixels."""
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1] * 6,
        num_res_blocks=1,
        temperal_downsample=[False] * 5,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        **options,
    ).eval()


def _edit(vae: AutoencoderKLQwenImage, **transformer: Any) -> dict[str, Any]:
    tokenizer = tokenizers.qwen()
    return {
        "transformer": filled(QwenImageTransformer2DModel(**SHAPE | transformer)),
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": encoders.qwen25_vl(tokenizer),
        "tokenizer": tokenizer,
        "processor": _processor(Qwen2VLProcessor, tokenizer),
    }


def qwen_image_edit(folder: Path) -> None:
    QwenImageEditPipeline(**_edit(_coarse())).save_pretrained(folder)


def qwen_image_edit_plus(folder: Path) -> None:
    QwenImageEditPlusPipeline(**_edit(_coarse())).save_pretrained(folder)


def qwen_image_layered(folder: Path) -> None:
    # What has as many channels as latents is taken for latents, and pictures have four here.
    vae = _coarse(2, input_channels=4)
    made = _edit(vae, in_channels=8, out_channels=2, use_additional_t_cond=True, use_layer3d_rope=True)
    QwenImageLayeredPipeline(**made).save_pretrained(folder)


def _qwen3(layers: int = 2) -> tuple[Any, Any]:
    tokenizer = tokenizers.qwen()
    encoder = encoders.qwen3_vl(tokenizer, Qwen3VLForConditionalGeneration, layers=layers)
    return encoder, _processor(Qwen3VLProcessor, tokenizer, patch_size=16)


def qwen_image_21(folder: Path) -> None:
    encoder, processor = _qwen3()
    vae = AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1] * 5,
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=filled(vae),
        text_encoder=encoder,
        processor=processor,
        transformer=filled(
            QwenImage21Transformer2DModel(
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                context_in_dim=encoders.WIDTH,
                axes_dims_rope=(8, 4, 4),
            )
        ),
    ).save_pretrained(folder)


def nucleus(folder: Path) -> None:
    # It reads the eighth layer from the end.
    encoder, processor = _qwen3(layers=8)
    NucleusMoEImagePipeline(
        transformer=filled(
            NucleusMoEImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=5,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=encoders.WIDTH,
                axes_dims_rope=(8, 4, 4),
                num_experts=4,
                moe_intermediate_dim=16,
                capacity_factors=2.0,
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoders.qwen(),
        text_encoder=encoder,
        processor=processor,
    ).save_pretrained(folder)


# What a picture is taken apart into is transparent.
LAYERS = {"image": picture(64).convert("RGBA"), "layers": 2}
GUIDED = {"negative_prompt": "a dog", "true_cfg_scale": 2.0}
NEEDS = "torchvision"

FAMILIES = [
    Family("qwenimage-edit", qwen_image_edit, arguments=GUIDED, needs=NEEDS),
    Family("qwenimage-edit-plus", qwen_image_edit_plus, arguments=GUIDED, needs=NEEDS),
    Family("qwenimage-layered", qwen_image_layered, arguments=GUIDED | LAYERS, needs=NEEDS),
    Family("qwenimage21", qwen_image_21, size=32, arguments=GUIDED, needs=NEEDS),
    Family("nucleusmoe-image", nucleus, size=32, arguments={"negative_prompt": "a dog"}, needs=NEEDS),
]

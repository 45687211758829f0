"""Pipelines that read Qwen: Qwen-Image, Z-Image, Ovis, Krea, Ideogram."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImageControlNetInpaintPipeline,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImageOmniPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import QWEN3_VL_ACTIVATION_LAYERS
from transformers import Siglip2ImageProcessor, Siglip2VisionConfig, Siglip2VisionModel

from . import autoencoders, encoders, tokenizers
from .family import Family, picture
from .weights import filled

SHAPE = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": encoders.WIDTH,
    "axes_dims_rope": (8, 4, 4),
}


def _qwen_image() -> dict[str, Any]:
    tokenizer = tokenizers.qwen()
    return {
        "transformer": filled(QwenImageTransformer2DModel(**SHAPE)),
        "vae": autoencoders.qwen(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": encoders.qwen25_vl(tokenizer),
        "tokenizer": tokenizer,
    }


def qwen_image(folder: Path) -> None:
    QwenImagePipeline(**_qwen_image()).save_pretrained(folder)


def qwen_image_controlnet(folder: Path) -> None:
    net = filled(QwenImageControlNetModel(**SHAPE))
    QwenImageControlNetPipeline(**_qwen_image(), controlnet=net).save_pretrained(folder)


def _z_image(**transformer: Any) -> dict[str, Any]:
    tokenizer = tokenizers.qwen()
    return {
        "transformer": filled(
            ZImageTransformer2DModel(
                in_channels=16,
                dim=32,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=encoders.WIDTH,
                axes_dims=[8, 4, 4],
                axes_lens=[256, 32, 32],
                **transformer,
            )
        ),
        "vae": autoencoders.shifted(16),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": encoders.qwen3(tokenizer),
        "tokenizer": tokenizer,
    }


def z_image(folder: Path) -> None:
    ZImagePipeline(**_z_image()).save_pretrained(folder)


def _z_control(pipeline_class: Any, folder: Path, channels: int) -> None:
    net = ZImageControlNetModel(
        control_layers_places=[0, 1],
        control_refiner_layers_places=[0],
        control_in_dim=channels,
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )
    pipeline_class(**_z_image(), controlnet=filled(net)).save_pretrained(folder)


def z_image_controlnet(folder: Path) -> None:
    _z_control(ZImageControlNetPipeline, folder, 16)


def z_image_controlnet_inpaint(folder: Path) -> None:
    _z_control(ZImageControlNetInpaintPipeline, folder, 33)


def z_image_omni(folder: Path) -> None:
    vision = Siglip2VisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        patch_size=8,
        num_patches=16,
        vision_use_head=False,
    )
    ZImageOmniPipeline(
        **_z_image(siglip_feat_dim=16),
        siglip=Siglip2VisionModel(vision).eval(),
        siglip_processor=Siglip2ImageProcessor(patch_size=8, max_num_patches=16),
    ).save_pretrained(folder)


def ovis(folder: Path) -> None:
    tokenizer = tokenizers.qwen()
    OvisImagePipeline(
        transformer=filled(
            OvisImageTransformer2DModel(
                patch_size=1,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=encoders.WIDTH,
                axes_dims_rope=(4, 4, 8),
            )
        ),
        vae=autoencoders.shifted(1),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=encoders.qwen3(tokenizer),
        tokenizer=tokenizer,
    ).save_pretrained(folder)


def krea2(folder: Path) -> None:
    tokenizer = tokenizers.qwen()
    Krea2Pipeline(
        transformer=filled(
            Krea2Transformer2DModel(
                in_channels=16,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=32,
                timestep_embed_dim=8,
                text_hidden_dim=encoders.WIDTH,
                num_text_layers=3,
                text_num_attention_heads=2,
                text_num_key_value_heads=1,
                text_intermediate_size=16,
                num_layerwise_text_blocks=1,
                num_refiner_text_blocks=1,
                axes_dims_rope=(4, 2, 2),
                rope_theta=1000.0,
            )
        ),
        vae=autoencoders.qwen(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=encoders.qwen3_vl(tokenizer),
        tokenizer=tokenizer,
        text_encoder_select_layers=(0, 1, 2),
    ).save_pretrained(folder)


def ideogram4(folder: Path) -> None:
    tokenizer = tokenizers.qwen()
    layers = len(QWEN3_VL_ACTIVATION_LAYERS)

    def transformer() -> Ideogram4Transformer2DModel:
        return filled(
            Ideogram4Transformer2DModel(
                in_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                intermediate_size=32,
                adaln_dim=16,
                llm_features_dim=layers * encoders.WIDTH,
                rope_theta=10_000,
                mrope_section=(2, 1, 1),
            )
        )

    Ideogram4Pipeline(
        transformer=transformer(),
        unconditional_transformer=transformer(),
        vae=autoencoders.flux2(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=encoders.qwen3_vl(tokenizer, layers=max(QWEN3_VL_ACTIVATION_LAYERS) + 1),
        tokenizer=tokenizer,
    ).save_pretrained(folder)


TEXT = {"max_sequence_length": 16}
CONTROL = TEXT | {"control_image": picture(32, turned=True)}

FAMILIES = [
    Family("qwenimage", qwen_image, size=32, arguments=TEXT | {"negative_prompt": "a dog", "true_cfg_scale": 2.0}),
    Family("qwenimage-controlnet", qwen_image_controlnet, size=32, arguments=CONTROL),
    Family("z-image", z_image, size=32, arguments=TEXT),
    Family("z-image-controlnet", z_image_controlnet, size=32, arguments=CONTROL),
    Family(
        "z-image-controlnet-inpaint",
        z_image_controlnet_inpaint,
        size=32,
        arguments=CONTROL | {"image": picture(32), "mask_image": picture(32)},
    ),
    Family("z-image-omni", z_image_omni, size=32, arguments=TEXT),
    Family("ovis", ovis, size=32, arguments={"max_sequence_length": 32}),
    Family("krea2", krea2, size=32, arguments=TEXT),
    Family("ideogram4", ideogram4, size=32, arguments={"guidance_schedule": None, "guidance_scale": 3.0}),
]

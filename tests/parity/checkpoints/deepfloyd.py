"""DeepFloyd IF, which denoises pixels."""

from __future__ import annotations

from pathlib import Path

from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel
from diffusers.pipelines.deepfloyd_if.watermark import IFWatermarker

from . import encoders, tokenizers
from .family import Family


def build(folder: Path) -> None:
    tokenizer = tokenizers.t5()
    IFPipeline(
        unet=UNet2DConditionModel(
            sample_size=32,
            in_channels=3,
            out_channels=6,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            cross_attention_dim=encoders.WIDTH,
            encoder_hid_dim=encoders.WIDTH,
            attention_head_dim=8,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            cross_attention_norm="group_norm",
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
        ),
        text_encoder=encoders.t5(tokenizer),
        tokenizer=tokenizer,
        scheduler=DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            sample_max_value=1.0,
            variance_type="learned_range",
        ),
        watermarker=IFWatermarker(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


FAMILIES = [Family("if", build, size=32)]

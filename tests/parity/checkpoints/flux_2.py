"""Flux 2, whose language model could see pictures: its processor needs torchvision."""

from __future__ import annotations

from pathlib import Path

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
)

from . import autoencoders, encoders, tokenizers
from .family import Family
from .weights import filled


def flux2(folder: Path) -> None:
    tokenizer = tokenizers.qwen()
    language = MistralConfig(**encoders.decoder(tokenizer), head_dim=8)
    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    mark = "<|image_pad|>"
    config = Mistral3Config(
        text_config=language, vision_config=vision, image_token_index=tokenizer.convert_tokens_to_ids(mark)
    )
    Flux2Pipeline(
        transformer=filled(
            Flux2Transformer2DModel(
                in_channels=4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=3 * encoders.WIDTH,
                timestep_guidance_channels=16,
                axes_dims_rope=(4, 4, 4, 4),
            )
        ),
        vae=autoencoders.flux2(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=Mistral3ForConditionalGeneration(config).eval(),
        tokenizer=PixtralProcessor(
            image_processor=PixtralImageProcessor(),
            tokenizer=tokenizer,
            chat_template=tokenizer.chat_template,
            patch_size=8,
            image_token=mark,
            image_break_token="<|vision_start|>",
            image_end_token="<|vision_end|>",
        ),
    ).save_pretrained(folder)


LAYERS = {"text_encoder_out_layers": (0, 1, 2), "max_sequence_length": 32}

FAMILIES = [Family("flux2", flux2, arguments=LAYERS, tolerance=3e-3, needs="torchvision")]

"""Autoencoders of images, of a few thousand weights."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage


def kl(channels: int = 4, **options: Any) -> AutoencoderKL:
    """Halves each side."""
    usual: dict[str, Any] = {
        "latent_channels": channels,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    return AutoencoderKL(**(usual | options)).eval()


def shifted(channels: int = 4, **options: Any) -> AutoencoderKL:
    """As flow-matching models have it: latents are shifted before they are scaled."""
    usual = {
        "shift_factor": 0.0609,
        "scaling_factor": 1.5035,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return kl(channels, **(usual | options))


def flux2() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        sample_size=32,
    ).eval()


def qwen(channels: int = 4) -> AutoencoderKLQwenImage:
    """Quarters each side."""
    return AutoencoderKLQwenImage(
        base_dim=channels * 2,
        z_dim=channels,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    ).eval()

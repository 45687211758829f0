"""How latents of the families lie: as planes, as videos, or packed into rows of tokens; here they become grids."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator

import torch
from torch import nn


def channels(decoder: nn.Module) -> int:
    """How many channels the decoder's latents have; 0 where it does not say so."""
    config = getattr(decoder, "config", {})
    return next((config[name] for name in ("latent_channels", "z_dim") if isinstance(config.get(name), int)), 0)


def kind(latents: torch.Tensor, channels: int) -> Hashable:
    """Equal for latents that lie alike and have as many channels."""
    return latents.dim(), width(latents, channels)


def width(latents: torch.Tensor, channels: int) -> int:
    """How many numbers there are of each place."""
    return latents.shape[-1] if latents.dim() == 3 else latents.shape[_channel(latents, channels)]


def grid(latents: torch.Tensor, channels: int, size: tuple[int, int] | None, rows: int = 0) -> torch.Tensor | None:
    """Latents as (picture, row, column, channel), of a video those of its first frame; None for what is no picture.

    `size` is the width and height of what they stand for, where that is known; `rows` how many packed ones have.
    """
    match latents.dim():
        case 4:
            return latents.permute(0, 2, 3, 1)
        case 5:
            return latents.movedim(_channel(latents, channels), -1)[:, 0]
        case 3 if size is not None:
            rows = rows or next(packed_rows(latents.shape[1], size, frames=1), 0)
            columns = round(rows * size[0] / size[1])
            if rows and columns and rows * columns <= latents.shape[1]:
                return latents[:, : rows * columns].reshape(len(latents), rows, columns, -1)
    return None


def packed_rows(tokens: int, size: tuple[int, int], *, frames: int) -> Iterator[int]:
    """How many rows a frame may have where so many tokens are one picture, or a video of at most so many frames."""
    width, height = size
    for count in range(1, frames + 1):
        rows = math.isqrt(tokens // count * height // width) if tokens % count == 0 else 0
        if rows and rows * rows * width == tokens // count * height and height % rows == 0:
            yield rows


def _channel(latents: torch.Tensor, channels: int) -> int:
    """Videos have their frames before or after the channels."""
    return 2 if latents.dim() == 5 and latents.shape[1] != channels == latents.shape[2] else 1

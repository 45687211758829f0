"""A VAE's call in pieces: sample by sample or tile by tile, for the time of that call only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

# Tiles are made smaller up to this many latent pixels: what a VAE sees beyond a tile's edge is lost on it.
MIN_LATENT_TILE = 16
SIZES = (
    "tile_latent_min_height",
    "tile_latent_min_size",
    "tile_latent_min_width",
    "tile_sample_min_height",
    "tile_sample_min_size",
    "tile_sample_min_width",
    "tile_sample_stride_height",
    "tile_sample_stride_width",
)


def can_slice(module: nn.Module) -> bool:
    return hasattr(module, "use_slicing")


def sliced(module: nn.Module) -> AbstractContextManager[None]:
    """One sample at a time, as after diffusers' `enable_slicing`."""
    return _set(module, {"use_slicing": True})


def tilings(module: nn.Module, side: int, *, of_latents: bool) -> Iterator[AbstractContextManager[None]]:
    """Ways to work in tiles, as after diffusers' `enable_tiling`, from large ones to small ones.

    `side` is the longer side of the call's argument, in latent pixels or in those of the picture. The first tiles are
    half of that or more, whatever the VAE's own are: the fewer there are, the fewer seams.
    """
    if not hasattr(module, "use_tiling"):
        return
    sizes = {name: size for name in SIZES if isinstance(size := getattr(module, name, None), int)}
    sample = min((size for name, size in sizes.items() if "sample_min" in name), default=0)
    latent = min(
        (size for name, size in sizes.items() if "latent_min" in name),
        default=sample // int(getattr(module, "spatial_compression_ratio", 8)),
    )
    if not latent:
        if not getattr(module, "use_tiling", False):
            # Its tiles have sizes that go by other names.
            yield _set(module, {"use_tiling": True})
        return
    factor = 1.0
    while (latent if of_latents else sample) * factor * 2 < side:
        factor *= 2
    while latent * factor >= min(latent, MIN_LATENT_TILE):
        if (latent if of_latents else sample) * factor < side:
            yield _set(module, {"use_tiling": True, **{name: int(size * factor) for name, size in sizes.items()}})
        factor /= 2


@contextmanager
def _set(module: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    before = {name: vars(module)[name] for name in values if name in vars(module)}
    vars(module).update(values)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                vars(module)[name] = before[name]
            else:
                del vars(module)[name]

"""From latents to colours by a linear map, fitted to pictures that a VAE has decoded.

Each latent element stands for a patch of the picture, and its channels are close to linear in the patch's mean colour.
That is all a preview needs, of every family: whatever scale, shift or packing its latents have is part of the map.
"""

from __future__ import annotations

import torch

# Pictures that the fit is made of; one alone may have one colour only.
ENOUGH = 8
# Keeps a fit to few colours from running wild where it has seen none, as a share of the mean square of a channel.
RIDGE = 1e-3


class RgbMap:
    """Latents of `channels` to red, green and blue in 0…1. Fitted and used from any thread."""

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._squares = torch.zeros(channels + 1, channels + 1, dtype=torch.float64)
        self._products = torch.zeros(channels + 1, 3, dtype=torch.float64)
        self._weights: torch.Tensor | None = None

    @property
    def is_ready(self) -> bool:
        return self._weights is not None

    @property
    def is_settled(self) -> bool:
        """Whether more pictures would change little."""
        return self._count >= ENOUGH

    def fit(self, latents: torch.Tensor, colours: torch.Tensor) -> None:
        """Takes a picture into account: (elements, channels), and (elements, 3) in 0…1."""
        wide = torch.cat([latents.double(), torch.ones(len(latents), 1, dtype=torch.float64)], dim=1)
        squares, products = wide.T @ wide, wide.T @ colours.double()
        if not (torch.isfinite(squares).all() and torch.isfinite(products).all()):
            return
        self._squares, self._products = self._squares + squares, self._products + products
        ridge = RIDGE * self._squares.diagonal()[:-1].mean().clamp(min=1e-12)
        ridges = torch.full((len(squares),), float(ridge), dtype=torch.float64)
        # Not for the constant: a picture of one colour is that colour.
        ridges[-1] = 1e-9
        self._weights = torch.linalg.solve(self._squares + torch.diag(ridges), self._products).float()
        self._count += 1

    def colours(self, latents: torch.Tensor) -> torch.Tensor:
        """Bytes of shape (…, 3) of latents of shape (…, channels), where those are."""
        assert self._weights is not None, "it was fitted before"
        weights = self._weights.to(latents.device)
        flat = latents.detach().float().reshape(-1, len(weights) - 1)
        colours = torch.addmm(weights[-1], flat, weights[:-1])
        return colours.clamp_(0, 1).mul_(255).round_().byte().reshape(*latents.shape[:-1], 3)

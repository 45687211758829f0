"""Weights of checkpoints that nobody trained."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def filled(module: M) -> M:
    """Weights that start at zero, or at whatever memory held, get values: a part that adds nothing tests nothing."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not bool(parameter.isfinite().all()) or not bool(parameter.any()):
                nn.init.normal_(parameter, std=0.02)
    return module.eval()

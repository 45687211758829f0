"""Configurations of pipelines and their parts as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from denoised.values import Plain

# Where a checkpoint lies on this machine is nobody's business.
PRIVATE = ("_name_or_path",)


def of(part: Any) -> dict[str, Plain]:
    """The whole configuration, as `save_config` would write it; empty for what has none."""
    config: Any = getattr(part, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        return {}
    return {str(name): _plain(value) for name, value in config.items() if name not in PRIVATE}


def of_components(pipeline: Any) -> dict[str, dict[str, Plain]]:
    """By role; components without a configuration are left out."""
    configs = {role: of(part) for role, part in pipeline.components.items() if part is not None}
    return {role: config for role, config in configs.items() if config}


def _plain(value: Any) -> Plain:
    match value:
        case torch.Tensor() | np.ndarray() | np.generic():
            return value.tolist()
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items() if key not in PRIVATE}
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
    return str(value)

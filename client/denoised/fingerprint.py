"""What identifies an image, a tensor or an array, whatever file or memory it came from."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image


def fingerprint(value: Any) -> tuple[str, str] | None:
    """Kind ("image", "tensor" or "ndarray") and SHA-256; None for what is none of them."""
    if isinstance(value, Image.Image):
        return "image", _digest(value.mode, value.size, value.tobytes())
    if isinstance(value, np.ndarray):
        return "ndarray", _digest(value.dtype.name, value.shape, np.ascontiguousarray(value).tobytes())
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous()
        data = (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy().tobytes()
        return "tensor", _digest(str(flat.dtype).removeprefix("torch."), tuple(flat.shape), data)
    return None


def fingerprints(arguments: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Those of all media in a call's arguments, by place: "image", "control_image[0]"."""
    return {place: found for name, value in arguments.items() for place, found in _walk(name, value)}


def _walk(place: str, value: Any) -> Iterator[tuple[str, tuple[str, str]]]:
    if (found := fingerprint(value)) is not None:
        yield place, found
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(f"{place}[{key}]", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _walk(f"{place}[{index}]", item)


def _digest(kind: str, shape: tuple[int, ...], data: bytes) -> str:
    digest = hashlib.sha256(f"{kind} {'x'.join(map(str, shape))}\n".encode())
    digest.update(data)
    return digest.hexdigest()

"""Arguments of a pipeline's `encode_prompt`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from denoised.errors import InvalidFieldError, UnknownArgumentError
from diffusers import DiffusionPipeline

from . import signature

METHOD = "encode_prompt"


def arguments(pipeline: DiffusionPipeline, given: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What to call it with on this device. Raises UnknownArgumentError and InvalidFieldError."""
    kind: Any = type(pipeline)
    known = {parameter.name: parameter for parameter in signature.parameters(kind, METHOD)}
    if not known:
        raise InvalidFieldError.of(
            "pipeline", f"a {kind.__name__} has no {METHOD}.", hint="Pass prompts to the pipeline itself."
        )
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name[:64], known, 1)
            raise UnknownArgumentError(
                f"{METHOD} of a {kind.__name__} takes no argument {name[:64]!r}.",
                hint=f"Did you mean {near[0]!r}?" if near else f"It takes {', '.join(known)}.",
                metadata={"argument": name[:64]},
            )
    chosen = dict(given)
    if "device" in known:
        chosen["device"] = device
    if isinstance(dtype := chosen.get("dtype"), str):
        chosen["dtype"] = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(chosen["dtype"], torch.dtype):
            raise InvalidFieldError.of("dtype", f"{dtype[:64]!r} is no element type.", hint="For example float16.")
    for name, parameter in known.items():
        if parameter.required and name not in chosen:
            raise InvalidFieldError.of(name, f"{METHOD} cannot run without it.", hint="Set it.")
    return chosen

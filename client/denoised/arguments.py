"""The arguments of `pipe(...)` as a `denoised.v1.GenerateRequest`."""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageOps

from . import media
from .channel import is_loopback
from .errors import InvalidFieldError
from .spec import one_of
from .v1 import generation_service_pb2 as pb
from .values import NDARRAY, Artifact, artifact_to_proto, to_proto

TEXTS = ("prompt", "negative_prompt")
IMAGES = ("image", "mask_image")
INTEGERS = ("height", "width", "num_inference_steps", "num_images_per_prompt")
REALS = ("guidance_scale", "strength")
BATCHING = {"allow": pb.BATCHING_ALLOW, "forbid": pb.BATCHING_FORBID}


def by_name(parameters: Sequence[str], positional: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Positional arguments by the names that the pipeline's `__call__` gives them. Raises TypeError as a call would."""
    if not parameters:
        # So it is with a pipeline that was loading when the daemon last described it.
        if len(positional) > 1:
            raise TypeError("what the pipeline takes was not known while it was loading: name the arguments")
        parameters = ("prompt",)
    if len(positional) > len(parameters):
        raise TypeError(f"the pipeline takes {len(parameters)} positional arguments, but {len(positional)} were given")
    named = dict(zip(parameters, positional, strict=False))
    if twice := [name for name in named if name in keywords]:
        raise TypeError(f"the pipeline got multiple values for argument {twice[0]!r}")
    return named | dict(keywords)


def add_arguments(request: pb.GenerateRequest, arguments: Mapping[str, Any]) -> None:
    """Raises InvalidFieldError for what cannot be sent."""
    for name, value in arguments.items():
        try:
            _add(request, name, media.pack(_read(name, value)))
        except (TypeError, OverflowError, UnicodeEncodeError) as error:
            raise InvalidFieldError.of(name, f"{error}.") from error


def add_values(request: pb.EncodePromptRequest, arguments: Mapping[str, Any]) -> None:
    """Raises InvalidFieldError for what cannot be sent."""
    for name, value in arguments.items():
        try:
            request.arguments[name].CopyFrom(to_proto(media.pack(value)))
        except (TypeError, OverflowError, UnicodeEncodeError) as error:
            raise InvalidFieldError.of(name, f"{error}.") from error


def _read(name: str, value: Any) -> Any:
    """Images that are named by their files, read as diffusers' `load_image` does; the daemon has other files."""
    if isinstance(value, list | tuple):
        return [_read(name, item) for item in value]
    if not isinstance(value, os.PathLike) and not (isinstance(value, str) and name.endswith("image")):
        return value
    try:
        with Image.open(value) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise InvalidFieldError.of(
            name, f"{os.fspath(value)!r} cannot be read as an image.", hint="Give a file, or a PIL image."
        ) from error


def _add(request: pb.GenerateRequest, name: str, value: Any) -> None:
    # A typed field only takes what its type says: the daemon explains better what is wrong with the rest.
    match value:
        case str() if name in TEXTS:
            setattr(request, name, value)
        case Artifact() if name in IMAGES:
            getattr(request, name).CopyFrom(artifact_to_proto(value))
        case bool():
            request.arguments[name].CopyFrom(to_proto(value))
        case int() if name in INTEGERS and -(2**31) <= value < 2**31:
            setattr(request.sampling, name, value)
        case int() | float() if name in REALS:
            setattr(request.sampling, name, float(value))
        case _:
            request.arguments[name].CopyFrom(to_proto(value))


def add_seeds(request: pb.GenerateRequest, seed: int | Sequence[int] | None) -> None:
    """Raises InvalidFieldError for what is no seed."""
    if seed is None:
        return
    try:
        seeds = [operator.index(item) for item in (seed if isinstance(seed, Sequence) else [seed])]
    except TypeError as error:
        raise InvalidFieldError.of("seed", f"{error}.", hint="Give an integer, or one per image.") from error
    if any(not 0 <= item < 2**64 for item in seeds):
        raise InvalidFieldError.of("seed", f"{seed} is out of range.", hint="Seeds go from 0 to 2**64 - 1.")
    request.sampling.seeds.extend(seeds)


def add_generators(request: pb.GenerateRequest, generator: Any) -> tuple[Any, ...]:
    """Sends the states of torch.Generators and returns the generators. Raises InvalidFieldError for anything else."""
    generators = tuple(generator) if isinstance(generator, list | tuple) else (generator,)
    torch = sys.modules.get("torch")
    for item in generators:
        if torch is None or not isinstance(item, torch.Generator):
            raise InvalidFieldError.of(
                "generator", f"a {type(item).__name__} is no torch.Generator.", hint="Without torch, use seed=."
            )
        request.sampling.generators.add(device=item.device.type, state=item.get_state().numpy().tobytes())
    return generators


def set_generators(generators: Sequence[Any], states: Sequence[pb.Generator]) -> None:
    """Advances the caller's generators as diffusers would have, in place."""
    torch: Any = sys.modules.get("torch")
    for generator, after in zip(generators, states, strict=False):
        generator.set_state(torch.frombuffer(bytearray(after.state), dtype=torch.uint8))


def add_output(
    request: pb.GenerateRequest,
    output_type: str,
    *,
    media_type: str,
    quality: int | None,
    target: str,
    frames_per_second: float | None = None,
) -> None:
    request.output.output_type = output_type
    if frames_per_second is not None:
        request.output.frames_per_second = frames_per_second
    if quality is not None:
        request.output.quality = quality
    if media_type:
        request.output.media_type = media_type
    elif output_type == "pil":
        # Both are lossless. On this machine copying raw pixels is faster than deflating and inflating them; on a
        # network the smaller PNG arrives first.
        request.output.media_type = NDARRAY if is_loopback(target) else "image/png"


def batching_number(batching: str) -> pb.Batching.ValueType:
    """Raises InvalidFieldError for an unknown name."""
    if batching not in BATCHING:
        raise InvalidFieldError.of("batching", f"{batching!r} is not known.", hint=one_of(BATCHING))
    return BATCHING[batching]


def priority_number(priority: int) -> int:
    """Raises InvalidFieldError for what cannot be sent; the daemon knows the bounds."""
    hint = "Give an integer from -100 to 100."
    try:
        number = operator.index(priority)
    except TypeError as error:
        raise InvalidFieldError.of("priority", f"{error}.", hint=hint) from error
    if not -(2**31) <= number < 2**31:
        raise InvalidFieldError.of("priority", f"{number} is out of range.", hint=hint)
    return number

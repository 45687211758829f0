"""Arguments of a call, checked against the pipeline's signature before anything waits or runs."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from denoised.errors import InvalidFieldError, UnknownArgumentError
from denoised.values import NDARRAY, TENSOR, Artifact, Plain

from .messages import Generate, Parameter

MAX_TEXT = 65_536
MAX_PROMPTS = 256
PROMPTS = ("prompt", "prompt_2", "prompt_3")
# Names that end so are tensors that go into the model as they are.
NUMBERS = ("latents", "embeds")
FLOATS = ("float32", "float16", "bfloat16", "float64")
# Comparing names takes time that grows with their length, and a message should be one that can be read.
SHOWN_NAME = 64
MAX_PRIORITY = 100
# Empty leaves it to the pipeline.
OUTPUT_TYPES = ("", "pil", "np", "pt", "latent")
MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp", "audio/wav", "video/mp4", NDARRAY)

# Ends of the names of arguments that take pictures, sounds and films.
MEDIA = frozenset({"image", "images", "mask", "masks", "video", "videos", "frames", "audio"})
# Arguments of `__call__` that mean something else, or nothing, at a distance.
_CALLBACK = "Progress arrives as events of the call."
RESERVED = {
    "generator": "Set sampling.seeds, or sampling.generators for exact states.",
    "output_type": "Set output.output_type.",
    "return_dict": "Outputs always come with the names of their fields.",
    "callback": _CALLBACK,
    "callback_steps": _CALLBACK,
    "callback_on_step_end": _CALLBACK,
    "callback_on_step_end_tensor_inputs": _CALLBACK,
}


def merge(typed: Mapping[str, Plain], others: Mapping[str, Plain]) -> dict[str, Plain]:
    """The arguments by name, from the typed fields of a request and its map."""
    for name in others:
        if name in typed:
            raise InvalidFieldError.of(
                name, "it is set twice, as a field and in `arguments`.", hint="Set it in one of the two places."
            )
    return {**typed, **others}


def check(command: Generate, parameters: Sequence[Parameter], *, max_pixels: int) -> None:
    """Raises InvalidFieldError or UnknownArgumentError for what cannot work."""
    for name, value in command.arguments.items():
        _check_text(name, value)
        _check_numbers(name, value)
    _check_prompts(command.arguments)
    _check_output(command)
    if command.method:
        # Its signature is the worker's to know.
        return
    known = {parameter.name: parameter for parameter in parameters}
    for name, value in command.arguments.items():
        if name in RESERVED:
            raise InvalidFieldError.of(name, "it cannot be passed to a pipeline of the daemon.", hint=RESERVED[name])
        if name not in known:
            raise _unknown(name, known)
        _check_kind(known[name], value)
        _check_no_address(name, value)
        if name in BOUNDS and isinstance(value, int | float):
            BOUNDS[name](name, value)
    for parameter in parameters:
        if parameter.required and parameter.name not in command.arguments and parameter.name not in RESERVED:
            raise InvalidFieldError.of(parameter.name, "the pipeline cannot run without it.", hint="Set it.")
    _check_size(command.arguments, max_pixels)
    _check_randomness(command, known)


def _unknown(name: str, known: Iterable[str]) -> UnknownArgumentError:
    names = [candidate for candidate in known if candidate not in RESERVED]
    name = name[:SHOWN_NAME]
    metadata = {"argument": name}
    hint = "GetPipeline lists what it takes."
    if near := difflib.get_close_matches(name, names, 1):
        metadata["suggestion"] = near[0]
        hint = f"Did you mean {near[0]!r}?"
    return UnknownArgumentError(f"The pipeline takes no argument {name!r}.", hint=hint, metadata=metadata)


def _check_kind(parameter: Parameter, value: Plain) -> None:
    kind = _kind(value)
    allowed = parameter.kinds
    if not allowed or kind in allowed or (kind == "int" and "float" in allowed):
        return
    # diffusers annotates many parameters more narrowly than their defaults.
    if kind == "none" and parameter.has_default and parameter.default is None:
        return
    wanted = parameter.annotation or " or ".join(sorted(allowed))
    raise InvalidFieldError.of(parameter.name, f"a value of kind {kind} does not fit.", hint=f"It takes {wanted}.")


def _kind(value: Plain) -> str:
    match value:
        case None:
            return "none"
        case bool() | int() | float() | str():
            return type(value).__name__
        case Artifact(media_type=media_type):
            # A video becomes the list of its frames.
            return {TENSOR: "tensor", NDARRAY: "ndarray"}.get(
                media_type, "list" if media_type.startswith("video/") else "image"
            )
        case Mapping():
            return "dict"
    return "list"


def _check_no_address(name: str, value: Plain) -> None:
    """Some pipelines open the file that a text names, or fetch its address: on the daemon's machine."""
    match value:
        case str() if name.rpartition("_")[2] in MEDIA:
            raise InvalidFieldError.of(name, "it is text.", hint="Send the picture itself; nothing is fetched.")
        case list() | tuple():
            for item in value:
                _check_no_address(name, item)


def _check_text(name: str, value: Plain) -> None:
    match value:
        case str() if len(value) > MAX_TEXT:
            raise InvalidFieldError.of(name, f"it has {len(value):,} characters.", hint=f"Send at most {MAX_TEXT:,}.")
        case list() | tuple():
            for item in value:
                _check_text(name, item)
        case Mapping():
            for item in value.values():
                _check_text(name, item)


def _check_numbers(name: str, value: Plain) -> None:
    """What goes into the model as it is: a single NaN there makes an image of nothing but NaN."""
    if not name.endswith(NUMBERS):
        return
    if isinstance(value, list | tuple):
        for item in value:
            _check_numbers(name, item)
    if isinstance(value, Artifact) and value.media_type in (TENSOR, NDARRAY):
        if value.dtype not in FLOATS:
            raise InvalidFieldError.of(name, f"its elements are {value.dtype or 'of no type'}.", hint="Send floats.")
        if value.dtype == "bfloat16":
            # NumPy has no such type: the exponent of what is not finite has all its bits.
            bits = np.frombuffer(value.data[: len(value.data) // 2 * 2], np.uint16)
            finite = bool(((bits & 0x7F80) != 0x7F80).all())
        else:
            size = np.dtype(value.dtype).itemsize
            finite = bool(np.isfinite(np.frombuffer(value.data[: len(value.data) // size * size], value.dtype)).all())
        if not finite:
            raise InvalidFieldError.of(name, "it has elements that are not finite.", hint="Send ordinary numbers.")


def _check_prompts(arguments: Mapping[str, Plain]) -> None:
    for name, value in arguments.items():
        if name.endswith(PROMPTS) and isinstance(value, list | tuple) and len(value) > MAX_PROMPTS:
            raise InvalidFieldError.of(
                name, f"it has {len(value):,} elements.", hint=f"Send at most {MAX_PROMPTS}, in several requests."
            )


def _between(low: float, high: float) -> Callable[[str, float], None]:
    def check(name: str, value: float) -> None:
        if not low <= value <= high:
            raise InvalidFieldError.of(name, f"{value:,} is out of range.", hint=f"Send {low:,} to {high:,}.")

    return check


def _positive(name: str, value: float) -> None:
    if not value >= 1:
        raise InvalidFieldError.of(name, f"{value:,} is too small.", hint="Send at least 1.")


def _finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise InvalidFieldError.of(name, f"{value} is not a finite number.", hint="Send an ordinary number.")


BOUNDS: Mapping[str, Callable[[str, float], None]] = {
    "height": _positive,
    "width": _positive,
    "num_inference_steps": _between(1, 1000),
    "guidance_scale": _finite,
    "strength": _between(0, 1),
    "num_images_per_prompt": _between(1, 64),
    "num_videos_per_prompt": _between(1, 64),
    "num_waveforms_per_prompt": _between(1, 64),
}


def _check_size(arguments: Mapping[str, Plain], max_pixels: int) -> None:
    sides = [size for name in ("height", "width") if isinstance(size := arguments.get(name), int | float)]
    # A side that is not sent is the pipeline's to choose; taken as large as the other, it is rarely underestimated.
    pixels = sides[0] * sides[-1] if sides else 0
    if pixels > max_pixels:
        raise InvalidFieldError.of(
            "height" if "height" in arguments else "width",
            f"{' x '.join(str(side) for side in sides)} may be more than {max_pixels:,} pixels.",
            hint="Ask for a smaller picture, set both height and width, or raise the daemon's setting max_pixels.",
        )


def _check_randomness(command: Generate, known: Mapping[str, Parameter]) -> None:
    if command.seeds and command.generators:
        raise InvalidFieldError.of("sampling.seeds", "it excludes sampling.generators.", hint="Send one of the two.")
    count = len(command.seeds) or len(command.generators)
    images = _image_count(command.arguments, known)
    if count > 1 and images and count != images:
        raise InvalidFieldError.of(
            "sampling.seeds" if command.seeds else "sampling.generators",
            f"there are {count} for {images} images.",
            hint="Send one for the whole call, or one for each image.",
        )
    if any(device not in ("cpu", "cuda") for device, _ in command.generators):
        raise InvalidFieldError.of("sampling.generators", "a device is not known.", hint='Send "cpu" or "cuda".')


# How many outputs a prompt has, by what they are.
COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


def _image_count(arguments: Mapping[str, Plain], known: Mapping[str, Parameter]) -> int:
    """How many images the call makes; 0 while that cannot be told from the arguments."""
    match arguments.get("prompt"), arguments.get("prompt_embeds"):
        case str(), _:
            prompts = 1
        case (list() | tuple()) as listed, _:
            prompts = len(listed)
        case None, Artifact(shape=(first, *_)):
            prompts = first
        case _:
            return 0
    name = next((name for name in COUNTS if name in known), COUNTS[0])
    each = arguments.get(name)
    if each is None and name in known:
        each = known[name].default
    return prompts * each if isinstance(each, int) else prompts


def _check_output(command: Generate) -> None:
    if command.output_type not in OUTPUT_TYPES:
        raise InvalidFieldError.of(
            "output.output_type", "it is not known.", hint=f"Send one of {', '.join(OUTPUT_TYPES[1:])}."
        )
    if command.media_type not in MEDIA_TYPES:
        raise InvalidFieldError.of(
            "output.media_type", "it is not known.", hint=f"Send one of {', '.join(MEDIA_TYPES)}."
        )
    if command.frames_per_second is not None and not 1 <= command.frames_per_second <= 240:
        raise InvalidFieldError.of(
            "output.frames_per_second", f"{command.frames_per_second} is out of range.", hint="Send 1 to 240."
        )
    if not 1 <= command.quality <= 100:
        raise InvalidFieldError.of("output.quality", f"{command.quality} is out of range.", hint="Send 1 to 100.")
    if abs(command.priority) > MAX_PRIORITY:
        raise InvalidFieldError.of(
            "priority", f"{command.priority} is out of range.", hint=f"Send -{MAX_PRIORITY} to {MAX_PRIORITY}."
        )

"""Images, arrays and tensors as Artifacts, and back. torch is used when it is there and never imported without need."""

from __future__ import annotations

import importlib
import io
import math
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .allowance import Allowance
from .errors import InvalidMediaError
from .values import DTYPES, NDARRAY, TENSOR, Artifact, Plain

# Modes that PNG keeps as they are.
PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})
# Modes that no format of ours keeps, and what they become.
ODD_MODES = {"HSV": "RGB", "La": "LA", "RGBa": "RGBA"}
# Pillow opens many more, some of which start other programs, and some of which have a long history of holes.
READ_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_DIMENSIONS = 16
ITEM_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}


def pack(value: Any) -> Plain:
    """A Python value of a diffusers call as a plain value. Raises TypeError for what cannot travel."""
    if value is None or isinstance(value, bool | int | float | str | Artifact):
        return value
    if isinstance(value, Image.Image):
        return pack_image(value)
    if isinstance(value, np.generic):
        return value.item()  # type: ignore[no-any-return]
    if isinstance(value, np.ndarray):
        if value.dtype.name not in DTYPES:
            raise TypeError(f"an array of {value.dtype} cannot be sent to a pipeline")
        little = value.astype(value.dtype.newbyteorder("<"), copy=False)
        order = _dim_order(value.shape, value.strides)
        data = little.transpose(order or range(value.ndim)).tobytes()
        return Artifact(NDARRAY, data, value.dtype.name, value.shape, order)
    if isinstance(value, Mapping):
        return {str(key): pack(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [pack(item) for item in value]
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _pack_tensor(value, torch)
    raise TypeError(f"a {type(value).__name__} cannot be sent to a pipeline")


def pack_image(image: Image.Image, media_type: str = "", quality: int = 90) -> Artifact:
    """Lossless unless the media type says otherwise: PNG at its fastest level, good for photographs on a network."""
    if media_type == NDARRAY:
        pixels = np.asarray(image)
        return Artifact(NDARRAY, pixels.tobytes(), pixels.dtype.name, pixels.shape)
    if image.mode in ODD_MODES:
        image = image.convert(ODD_MODES[image.mode])
    if image.mode not in PNG_MODES and media_type in ("", "image/png"):
        raise TypeError(f"an image of mode {image.mode} cannot be sent; convert it, for example to RGB")
    media_type = media_type or "image/png"
    buffer = io.BytesIO()
    match media_type:
        case "image/png":
            # Run lengths of what Pillow's filters leave: half the time of level 1, and smaller for photographs.
            image.save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
        case "image/jpeg":
            image.convert("RGB").save(buffer, "JPEG", quality=quality)
        case "image/webp":
            image.save(buffer, "WEBP", quality=quality, method=2)
        case _:
            raise TypeError(f"images cannot be encoded as {media_type}")
    return Artifact(media_type, buffer.getvalue())


def unpack(value: Plain, allowance: Allowance | None = None) -> Any:
    """The reverse of `pack`; sounds and videos stay files. Raises InvalidMediaError for what cannot be decoded.

    With an allowance, which is for what comes from somebody else, also for pictures that are too large and for numbers
    that are not finite.
    """
    if isinstance(value, Artifact):
        if value.media_type == TENSOR:
            return _unpack_tensor(value, is_foreign=allowance is not None)
        if value.media_type == NDARRAY:
            return _unpack_array(value, is_foreign=allowance is not None)
        if value.media_type.startswith(("audio/", "video/")):
            return value
        return _unpack_image(value, allowance)
    if isinstance(value, Mapping):
        return {key: unpack(item, allowance) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [unpack(item, allowance) for item in value]
    return value


def _pack_tensor(tensor: Any, torch: Any) -> Artifact:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise TypeError(f"a tensor of {dtype} cannot be sent to a pipeline")
    order = _dim_order(tensor.shape, tensor.stride())
    flat = tensor.detach().cpu().permute(order or tuple(range(tensor.dim()))).contiguous()
    # NumPy has no bfloat16: its bytes travel as those of 16-bit integers.
    data = (flat.view(torch.int16) if dtype == "bfloat16" else flat).numpy().tobytes()
    return Artifact(TENSOR, data, dtype, tuple(tensor.shape), order)


def _unpack_tensor(artifact: Artifact, *, is_foreign: bool) -> Any:
    _check_layout(artifact)
    torch = importlib.import_module("torch")
    dtype = getattr(torch, artifact.dtype)
    if not artifact.data:
        return torch.empty(artifact.shape, dtype=dtype)
    # A copy: torch wants memory that it may write to.
    flat = torch.frombuffer(bytearray(artifact.data), dtype=torch.uint8 if artifact.dtype == "bool" else dtype)
    if artifact.dtype == "bool":
        # Other bytes than 0 and 1 are no truth values, whatever else they are.
        flat = flat != 0
    if is_foreign and dtype.is_floating_point and not torch.isfinite(flat).all():
        raise _not_finite()
    return flat.reshape(_stored_shape(artifact)).permute(_restoring(artifact))


def _unpack_array(artifact: Artifact, *, is_foreign: bool) -> Any:
    _check_layout(artifact)
    if artifact.dtype == "bfloat16":
        raise InvalidMediaError("NumPy has no bfloat16.", hint="Send it as application/x-tensor.")
    flat = np.frombuffer(bytearray(artifact.data), np.uint8 if artifact.dtype == "bool" else artifact.dtype)
    if artifact.dtype == "bool":
        flat = flat != 0
    if is_foreign and flat.dtype.kind == "f" and not np.isfinite(flat).all():
        raise _not_finite()
    return flat.reshape(_stored_shape(artifact)).transpose(_restoring(artifact))


def _not_finite() -> InvalidMediaError:
    return InvalidMediaError(
        "A tensor has numbers that are not finite.", hint="Look for a division by zero, or an overflow in float16."
    )


def _dim_order(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Dimensions as they lie in memory, outermost first; empty for row-major."""
    wide = [dim for dim in range(len(shape)) if shape[dim] != 1]
    stored = sorted(wide, key=lambda dim: -strides[dim])
    if stored == wide:
        return ()
    # Where a dimension of size 1 lies means nothing: first.
    return (*(dim for dim in range(len(shape)) if shape[dim] == 1), *stored)


def _stored_shape(artifact: Artifact) -> tuple[int, ...]:
    return tuple(artifact.shape[dim] for dim in artifact.dim_order) or artifact.shape


def _restoring(artifact: Artifact) -> tuple[int, ...]:
    """The permutation that takes stored dimensions back to those of the shape."""
    order = artifact.dim_order or tuple(range(len(artifact.shape)))
    return tuple(order.index(dim) for dim in range(len(order)))


def _check_layout(artifact: Artifact) -> None:
    if artifact.dtype not in DTYPES:
        raise InvalidMediaError("A tensor has no element type.", hint="Set `tensor.dtype`.")
    if len(artifact.shape) > MAX_DIMENSIONS or any(not 0 <= size < 2**31 for size in artifact.shape):
        raise InvalidMediaError(
            f"A tensor has the shape {list(artifact.shape[:MAX_DIMENSIONS])}.",
            hint=f"It has at most {MAX_DIMENSIONS} dimensions; their sizes start at 0.",
        )
    if artifact.dim_order and sorted(artifact.dim_order) != list(range(len(artifact.shape))):
        raise InvalidMediaError(
            f"A tensor of {len(artifact.shape)} dimensions has the dim_order {list(artifact.dim_order)}.",
            hint="Name each dimension once, or leave it out.",
        )
    expected = math.prod(artifact.shape) * ITEM_BYTES.get(artifact.dtype, 1)
    if expected != len(artifact.data):
        raise InvalidMediaError(
            f"A tensor of {artifact.dtype} and shape {list(artifact.shape)} takes {expected} bytes, "
            f"but {len(artifact.data)} were sent.",
            hint="Send the elements densely, row by row, little-endian.",
        )


def _unpack_image(artifact: Artifact, allowance: Allowance | None) -> Image.Image:
    if not artifact.media_type.startswith("image/"):
        raise InvalidMediaError(
            f"The media type {artifact.media_type[:80]!r} is not known.",
            hint="Send image/png, image/jpeg, image/webp, application/x-tensor or application/x-ndarray.",
        )
    try:
        # Reads the header only.
        image = Image.open(io.BytesIO(artifact.data), formats=READ_FORMATS)
        if allowance is not None:
            allowance.take(*image.size)
        if getattr(image, "n_frames", 1) > 1:
            raise InvalidMediaError("The image is an animation.", hint="Send one of its frames.")
        image.load()
        # As diffusers' load_image does. What is loaded lazily holds on to its bytes and is no plain Image.Image, which
        # diffusers checks for in places.
        return ImageOps.exif_transpose(image).copy()
    except InvalidMediaError:
        raise
    except Image.DecompressionBombError as error:
        raise InvalidMediaError("The image has too many pixels.", hint="Send a smaller one.") from error
    # Pillow's decoders raise whatever their format makes them: OSError, SyntaxError, struct.error, ValueError, …
    except Exception as error:
        raise InvalidMediaError(
            f"{len(artifact.data)} bytes sent as {artifact.media_type[:80]} are not an image that can be decoded.",
            hint="Send a whole PNG, JPEG or WebP file.",
        ) from error

"""What forms of a picture take: time and bytes, of one like a photograph and of one with plain areas."""

from __future__ import annotations

import io
import statistics
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from tests.benchmarks import setting

SIZE = 1024
ROUNDS = 5
FORMS: dict[str, tuple[str, dict[str, object]]] = {
    "PNG, level 6 (Pillow's own)": ("PNG", {}),
    "PNG, level 1": ("PNG", {"compress_level": 1}),
    "PNG, level 1, run lengths": ("PNG", {"compress_level": 1, "compress_type": zlib.Z_RLE}),
    "PNG, level 0": ("PNG", {"compress_level": 0}),
    "JPEG, quality 90": ("JPEG", {"quality": 90}),
    "WebP, quality 90, method 0": ("WEBP", {"quality": 90, "method": 0}),
    "WebP, quality 90, method 2": ("WEBP", {"quality": 90, "method": 2}),
    "WebP, quality 90, method 4": ("WEBP", {"quality": 90, "method": 4}),
}


def photograph() -> Image.Image:
    """Soft shapes with the grain of a camera."""
    dice = np.random.default_rng(0)
    shapes = Image.fromarray(dice.integers(0, 256, (SIZE // 16, SIZE // 16, 3), dtype=np.uint8))
    soft = np.asarray(shapes.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray((soft + dice.integers(-3, 4, soft.shape)).clip(0, 255).astype(np.uint8))


def drawing() -> Image.Image:
    """Plain areas with soft edges."""
    dice = np.random.default_rng(0)
    areas = Image.fromarray(dice.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    large = areas.resize((SIZE, SIZE), Image.Resampling.NEAREST)
    return large.rotate(20, Image.Resampling.BICUBIC)


def saved(picture: Image.Image, form: str, options: dict[str, object]) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def main() -> None:
    for kind, picture in (("photograph", photograph()), ("drawing", drawing())):
        raw = len(picture.tobytes())
        measure(kind, "raw", raw, lambda picture=picture: np.asarray(picture).tobytes())  # type: ignore[misc]
        for name, (form, options) in FORMS.items():
            encode: Callable[[], bytes] = lambda p=picture, f=form, o=options: saved(p, f, o)  # type: ignore[misc] # noqa: E731
            measure(kind, name, raw, encode)


def measure(kind: str, name: str, raw: int, encode: Callable[[], bytes]) -> None:
    times = [setting.seconds(encode) for _ in range(ROUNDS)]
    share = len(encode()) / raw
    print(f"{kind:11} {name:28} {statistics.median(times) * 1e3:7.1f} ms  {share:6.1%} of {raw:,} bytes")


if __name__ == "__main__":
    main()

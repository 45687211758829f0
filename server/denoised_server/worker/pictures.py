"""Pictures that are made from numbers when they are first looked at: not on the engine's thread."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

# Made faster than another thread wakes up.
SMALL_PIXELS = 1 << 14
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Picture(Image.Image):
    """A PIL image that is not there yet. Whatever looks at its pixels makes it."""

    def __init__(self, mode: str, size: tuple[int, int], make: Callable[[], Image.Image]) -> None:
        self._make: Callable[[], Image.Image] | None = None
        # It may be encoded on one thread and compared on another.
        self._making = threading.Lock()
        super().__init__()
        self._mode, self._size, self._make = mode, size, make

    @property
    def im(self) -> Any:
        with self._making:
            if self._make is not None:
                self._im, self._make = self._make().im, None
        return self._im

    @im.setter
    def im(self, im: Any) -> None:
        self._im = im

    def load(self) -> Any:
        # Looked at first: what is not there yet would count as empty.
        return super().load() if self.im is not None else None


def defer(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Processors to put in place of the pipeline's own, which make pictures of what they are given later."""
    return {
        name: _deferring(value)
        for name, value in vars(pipeline).items()
        if isinstance(value, VaeImageProcessor) and type(value).postprocess is VaeImageProcessor.postprocess
    }


def _deferring(processor: Any) -> Any:
    deferring = copy.copy(processor)

    def postprocess(image: Any, output_type: str = "pil", do_denormalize: list[bool] | None = None) -> Any:
        if output_type != "pil" or not isinstance(image, torch.Tensor) or image.dim() != 4:
            return processor.postprocess(image, output_type, do_denormalize)
        count, channels, height, width = image.shape
        if channels not in MODES or count * height * width <= SMALL_PIXELS:
            return processor.postprocess(image, output_type, do_denormalize)
        return [
            Picture(
                MODES[channels],
                (width, height),
                partial(
                    _make, processor, image[index : index + 1], do_denormalize and do_denormalize[index : index + 1]
                ),
            )
            for index in range(count)
        ]

    # Not by setattr, which would rewrite the configuration that the copy shares.
    vars(deferring)["postprocess"] = postprocess
    return deferring


def _make(processor: Any, image: torch.Tensor, do_denormalize: list[bool] | None) -> Image.Image:
    (made,) = processor.postprocess(image, "pil", do_denormalize)
    picture: Image.Image = made
    return picture

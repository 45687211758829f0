"""Previews: small pictures of what a request is making, from its latents, by maps that are fitted on the way."""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from denoised import media
from denoised_server.messages import Preview, PreviewOptions
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from . import layouts
from .rgb_map import RgbMap

logger = logging.getLogger(__name__)

# Whose output the pictures are: the first that a pipeline has.
DECODERS = ("vae", "movq", "vqgan", "vqvae", "unet", "transformer")
QUALITY = 80

# Of one video, each (height, width, 3) in 0…1.
Frames: TypeAlias = "list[np.ndarray[Any, Any]]"


@dataclass(slots=True)
class _Maps:
    """Those of one decoder, by the kind of latents. `sizes` and `rows` have what was seen of latents of a shape."""

    maps: dict[Hashable, RgbMap] = field(default_factory=dict)
    sizes: dict[Hashable, tuple[int, int]] = field(default_factory=dict)
    rows: dict[Hashable, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def are_settled(self) -> bool:
        return bool(self.maps) and all(known.is_settled for known in list(self.maps.values()))


class Previews:
    """The maps of a worker, and the threads that make pictures by them."""

    def __init__(self, pool: Executor) -> None:
        self._pool = pool
        self._maps: weakref.WeakKeyDictionary[nn.Module, _Maps] = weakref.WeakKeyDictionary()

    def of(
        self,
        pipeline: DiffusionPipeline,
        arguments: Mapping[str, Any],
        options: PreviewOptions | None,
        emit: Callable[[Preview], None],
    ) -> Previewer | None:
        """For one request, on the engine's thread; None where there is nothing to show or to learn."""
        decoder = next(
            (part for name in DECODERS if isinstance(part := getattr(pipeline, name, None), nn.Module)), None
        )
        if decoder is None or arguments.get("padding_mask_crop") is not None:
            # Of the latter, the picture is more than what is decoded.
            return None
        maps = self._maps.setdefault(decoder, _Maps())
        if options is None and maps.are_settled:
            return None
        return Previewer(self._pool, maps, layouts.channels(decoder), arguments, options, emit)


class Previewer:
    """Looks on as one request makes its steps.

    It keeps the last latents until the map is known well enough, and makes previews where the request wants them: on
    the engine's thread no more than the colours, and none while the one before is still on its way.
    """

    def __init__(
        self,
        pool: Executor,
        maps: _Maps,
        channels: int,
        arguments: Mapping[str, Any],
        options: PreviewOptions | None,
        emit: Callable[[Preview], None],
    ) -> None:
        self._pool, self._maps, self._channels = pool, maps, channels
        self._asked = arguments.get("height"), arguments.get("width")
        self._learns = arguments.get("output_type") != "latent"
        self._options, self._emit = options, emit
        self._latents: torch.Tensor | None = None
        self._is_busy = self._is_over = False

    def stepped(self, scheduler: Any, model_output: Any, result: Any, completed: int, total: int) -> None:
        """A step of the request's noise scheduler came to this."""
        latents = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)
        if not isinstance(latents, torch.Tensor) or latents.dim() < 3:
            return
        known = self._maps.maps.get(layouts.kind(latents, self._channels))
        if self._learns and (known is None or not known.is_settled):
            self._latents = latents
        if self._options is None or known is None or not known.is_ready or self._is_busy:
            return
        if completed < total and completed % self._options.step_interval == 0:
            try:
                self._show(known, _estimate(scheduler, model_output, result, latents), completed, total)
            except Exception:
                logger.debug("a preview could not be made", exc_info=True)

    def fit(self, result: Any) -> None:
        """Learns from the pictures that the request has come to; the last use of it."""
        latents, self._latents, self._is_over = self._latents, None, True
        if latents is None:
            return
        try:
            self._fit(latents.detach().cpu(), [frames for frames in _videos(result) if frames])
        except Exception:
            logger.debug("nothing could be learned for previews", exc_info=True)

    def _fit(self, latents: torch.Tensor, videos: list[Frames]) -> None:
        if len(videos) != len(latents):
            return
        height, width, _ = videos[0][0].shape
        shape = self._shape(latents)
        with self._maps.lock:
            self._maps.sizes[shape] = width, height
            if latents.dim() == 3 and shape not in self._maps.rows:
                rows = list(layouts.packed_rows(latents.shape[1], (width, height), frames=len(videos[0])))
                self._maps.rows[shape] = min(rows, key=lambda each: self._misfit(latents, videos, each), default=0)
            known = self._maps.maps.setdefault(
                layouts.kind(latents, self._channels), RgbMap(layouts.width(latents, self._channels))
            )
            self._add(known, latents, videos, self._maps.rows.get(shape, 0))

    def _add(self, known: RgbMap, latents: torch.Tensor, videos: list[Frames], rows: int) -> None:
        height, width, _ = videos[0][0].shape
        grids = layouts.grid(latents, self._channels, (width, height), rows)
        if grids is not None:
            for one, frames in zip(grids, videos, strict=True):
                known.fit(one.flatten(0, 1), _colours(frames[0], one.shape[1], one.shape[0]))

    def _misfit(self, latents: torch.Tensor, videos: list[Frames], rows: int) -> float:
        """How badly the best map fits if packed latents have so many rows."""
        known = RgbMap(layouts.width(latents, self._channels))
        self._add(known, latents, videos, rows)
        height, width, _ = videos[0][0].shape
        grids = layouts.grid(latents, self._channels, (width, height), rows)
        if grids is None or not known.is_ready:
            return math.inf
        shown = known.colours(grids[0].flatten(0, 1)).float() / 255
        return float((shown - _colours(videos[0][0], grids.shape[2], grids.shape[1])).square().mean())

    def _show(self, known: RgbMap, latents: torch.Tensor, completed: int, total: int) -> None:
        shape = self._shape(latents)
        size = self._maps.sizes.get(shape)
        height, width = self._asked
        if size is None and isinstance(height, int) and isinstance(width, int):
            size = width, height
        grids = layouts.grid(latents, self._channels, size, self._maps.rows.get(shape, 0))
        if grids is not None:
            self._is_busy = True
            self._pool.submit(self._send, known.colours(grids), completed, total)

    def _shape(self, latents: torch.Tensor) -> Hashable:
        return tuple(latents.shape[1:]), self._asked

    def _send(self, pixels: torch.Tensor, completed: int, total: int) -> None:
        """On a thread of the pool, which is the one that waits for the device."""
        assert self._options is not None, "previews are wanted"
        try:
            for index, each in enumerate(pixels.cpu().numpy()):
                image = Image.fromarray(each)
                scale = self._options.size / max(image.size)
                width, height = (max(1, round(side * scale)) for side in image.size)
                artifact = media.pack_image(
                    image.resize((width, height), Image.Resampling.BICUBIC), "image/jpeg", QUALITY
                )
                if not self._is_over:
                    self._emit(Preview(index, completed, total, artifact))
        finally:
            self._is_busy = False


def _estimate(scheduler: Any, model_output: Any, result: Any, latents: torch.Tensor) -> torch.Tensor:
    """What the latents are on the way to, where the noise scheduler knows: without noise, they show more."""
    other = (
        result[1] if isinstance(result, tuple) and len(result) > 1 else getattr(result, "pred_original_sample", None)
    )
    if isinstance(other, torch.Tensor) and other.shape == latents.shape:
        return other
    index, sigmas = getattr(scheduler, "step_index", None), getattr(scheduler, "sigmas", None)
    is_flow = type(scheduler).__name__.startswith("FlowMatchEuler")
    if is_flow and index is not None and sigmas is not None and getattr(model_output, "shape", None) == latents.shape:
        # The number stays where it is: reading it would wait for the device.
        estimate: torch.Tensor = latents - sigmas[index].to(latents) * model_output
        return estimate
    return latents


def _videos(result: Any) -> Iterator[Frames]:
    """Frames of what a request has made; a picture is a video of one frame."""
    value = getattr(result, "images", None)
    value = getattr(result, "frames", None) if value is None else value
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().float()
        value = value.movedim(-3, -1).numpy()
    if isinstance(value, np.ndarray) and value.ndim in (4, 5) and value.shape[-1] == 3:
        for each in value:
            yield [each] if value.ndim == 4 else list(each)
    elif isinstance(value, list | tuple):
        for each in value:
            frames = [each] if isinstance(each, Image.Image) else each
            if isinstance(frames, list) and all(isinstance(frame, Image.Image) for frame in frames):
                first = np.asarray(frames[0].convert("RGB"), np.float32) / 255
                # Only the first one is looked at.
                yield [first] * len(frames)


def _colours(frame: np.ndarray[Any, Any], columns: int, rows: int) -> torch.Tensor:
    """Mean colours of a frame's patches, row by row."""
    image = torch.from_numpy(np.ascontiguousarray(frame, np.float32)).permute(2, 0, 1)[None]
    small = torch.nn.functional.interpolate(image, (rows, columns), mode="area")[0]
    return small.flatten(1).T

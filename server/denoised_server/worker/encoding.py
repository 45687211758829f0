"""What a pipeline returned, as outputs. Each is encoded by a job of its own, on whatever thread."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from denoised import media
from denoised.values import NDARRAY, Artifact, Plain
from denoised_server.messages import Generate, Output
from diffusers import DiffusionPipeline
from PIL import Image

from . import recordings
from .pictures import Picture

# Copied, or made and compressed, faster than another thread wakes up and takes its turns with the engine's.
RAW_BYTES = 1 << 20
COMPRESSED_BYTES = 1 << 15

Job: TypeAlias = Callable[[], list[Output]]


class Encoding:
    """The result of one request.

    Attributes:
        jobs: Each encodes some of its outputs.
        fields: What is no media.
        field_names: All of its fields, in order.
        is_light: Whether all of the jobs together take less than having another thread do them.
    """

    def __init__(
        self, result: Any, command: Generate, pipeline: DiffusionPipeline, arguments: Mapping[str, Any]
    ) -> None:
        self._command, self._pipeline, self._arguments = command, pipeline, arguments
        self.fields: dict[str, Plain] = {}
        returned = _fields(result)
        self.field_names = tuple(returned)
        self.is_light = self._is_light(returned.values())
        self.jobs: list[Job] = [job for name, value in returned.items() for job in self._jobs(name, value)]

    def _jobs(self, name: str, value: Any) -> Iterator[Job]:
        if value is not None and recordings.FIELDS.get(name) == self._command.media_type:
            yield partial(self._recordings, name, value)
        elif are_images(value):
            for index, image in enumerate(value):
                yield partial(self._picture, name, image, index)
        elif are_videos(value):
            for group, video in enumerate(value):
                for index, image in enumerate(video):
                    yield partial(self._picture, name, image, index, group)
        elif isinstance(value, torch.Tensor | np.ndarray):
            yield partial(self._numbers, name, value)
        else:
            self.fields[name] = media.pack(value)

    def _is_light(self, values: Any) -> bool:
        if self._command.media_type in recordings.FIELDS.values():
            return False
        copied = made = 0
        for value in values:
            if isinstance(value, torch.Tensor | np.ndarray):
                copied += value.nbytes
            elif are_images(value):
                size = sum(image.width * image.height * len(image.getbands()) for image in value)
                if self._command.media_type == NDARRAY and not any(isinstance(image, Picture) for image in value):
                    copied += size
                else:
                    made += size
            elif are_videos(value):
                return False
        return copied <= RAW_BYTES and made <= COMPRESSED_BYTES

    def _recordings(self, name: str, value: Any) -> list[Output]:
        return [
            Output(name, index, artifact, self._seed(index)) for index, artifact in enumerate(self._recorded(value))
        ]

    def _picture(self, name: str, image: Image.Image, index: int, group: int | None = None) -> list[Output]:
        is_file = self._command.media_type in recordings.FIELDS.values()
        artifact = media.pack_image(image, "" if is_file else self._command.media_type, self._command.quality)
        seed = self._seed(index if group is None else group)
        return [Output(name, index, artifact, seed, group, image.width, image.height)]

    def _numbers(self, name: str, value: torch.Tensor | np.ndarray[Any, Any]) -> list[Output]:
        packed = media.pack(value)
        assert isinstance(packed, Artifact), "arrays travel as artifacts"
        return [Output(name, 0, packed, self._seed(0))]

    def _recorded(self, value: Any) -> list[Artifact]:
        if self._command.media_type == recordings.WAV:
            return recordings.sounds(value, recordings.sampling_rate(self._pipeline))
        rate = self._command.frames_per_second
        parameters = inspect.signature(type(self._pipeline).__call__).parameters
        for name in ("frame_rate", "fps"):
            if rate is None and name in parameters:
                rate = self._arguments.get(name, parameters[name].default)
        return recordings.videos(value, rate if isinstance(rate, int | float) else recordings.FRAMES_PER_SECOND)

    def _seed(self, index: int) -> int | None:
        seeds = self._command.seeds
        if not seeds:
            return None
        return seeds[index] if index < len(seeds) else seeds[0]


def _fields(result: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(result):
        # Not as a mapping: diffusers leaves fields that are None out of it.
        return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    if isinstance(result, Mapping):
        return dict(result)
    if not isinstance(result, tuple | list):
        return {"output": result}
    return {f"output_{index}": part for index, part in enumerate(result)}


def are_images(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Image.Image) for item in value)


def are_videos(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(are_images(video) for video in value)

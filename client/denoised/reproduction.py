"""Making a picture again from its manifest, and comparing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from . import arguments
from .errors import InvalidFieldError
from .fingerprint import fingerprint, fingerprints
from .manifest import Embedded, Manifest
from .v1 import artifact_pb2, pipeline_service_pb2
from .v1 import generation_service_pb2 as pb
from .values import from_proto

# Largest difference of a pixel, of 255, that joining calls explains: by whether weights are held in 32 bits or more.
ROUNDING = {True: 2, False: 16}
WIDE = (artifact_pb2.DATA_TYPE_FLOAT32, artifact_pb2.DATA_TYPE_FLOAT64)
INDEX = re.compile(r"\[([^\]]*)\]")


def request(
    manifest: Manifest, pipeline: pipeline_service_pb2.Pipeline, media: Mapping[str, Any]
) -> pb.GenerateRequest:
    """The request that makes all its images again, each call alone. `media` are images and tensors by place.

    Raises InvalidFieldError for media that are missing or are others than they were.
    """
    message = manifest.message
    named: dict[str, Any] = {name: from_proto(value) for name, value in message.arguments.items()}
    given = fingerprints(media)
    for place, (kind, digest) in manifest.media.items():
        if place not in given:
            raise InvalidFieldError.of(place, f"it was made from an {kind} that is not given.", hint=f"Give {place!r}.")
        if given[place] != (kind, digest):
            raise InvalidFieldError.of(
                place, f"the {given[place][0]} is not the one that it was made from.", hint=f"Its digest was {digest}."
            )
        _put(named, place, media[place])
    found = pb.GenerateRequest(pipeline=pipeline.name, batching=pb.BATCHING_FORBID)
    found.sampling.seeds.extend(message.seeds)
    found.sampling.generators.extend(message.generators)
    arguments.add_output(found, "pil", media_type="", quality=None, target="")
    arguments.add_arguments(found, named)
    if message.HasField("noise_scheduler") and message.noise_scheduler != pipeline.noise_scheduler:
        found.noise_scheduler.CopyFrom(message.noise_scheduler)
    if message.HasField("adapters"):
        found.adapters.CopyFrom(message.adapters)
    return found


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a picture and the one that was made again compare.

    Attributes:
        is_identical: Whether the pixels are the same, bit for bit.
        is_within_rounding: Whether they differ by no more than the joining of calls explains, or not at all.
        difference: Largest difference of a pixel, of 255; None for pictures of other sizes.
        differences: What decides the bits and is not as it was, in words.
    """

    is_identical: bool
    is_within_rounding: bool
    difference: int | None
    differences: list[str]


def compare(picture: Image.Image, embedded: Embedded, again: Image.Image, manifest: Manifest) -> Comparison:
    """`picture` is the one with the manifest `embedded`, `again` the one that was made now, with its own manifest."""
    made = fingerprint(again)
    is_identical = made is not None and made[1] == embedded.pixels
    difference = None
    if picture.size == again.size:
        pixels = (np.asarray(image.convert("RGB"), dtype=np.int16) for image in (picture, again))
        difference = int(np.abs(next(pixels) - next(pixels)).max())
    is_wide = all(part.dtype in WIDE for part in embedded.manifest.message.components)
    is_rounding = embedded.manifest.joined and difference is not None and difference <= ROUNDING[is_wide]
    return Comparison(is_identical, is_identical or is_rounding, difference, embedded.manifest.differences(manifest))


def _put(named: dict[str, Any], place: str, value: Any) -> None:
    """Sets what is at a place such as "control_image[0]"."""
    name, *path = place.partition("[")[0], *INDEX.findall(place)
    holder: Any = named
    key: Any = name
    for step in path:
        holder = holder[key]
        key = int(step) if isinstance(holder, list) else step
    holder[key] = value

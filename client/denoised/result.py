"""What a pipeline returns: diffusers' output classes with seeds and timings."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from . import manifest, media
from .manifest import Manifest
from .units import from_duration
from .v1 import generation_service_pb2 as pb
from .values import NDARRAY, Artifact, artifact_from_proto, from_proto


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a generation went.

    Attributes:
        queue_seconds: Waiting to be admitted.
        run_seconds: From admission until the pipeline returned.
        device_seconds: On the device in calls of this generation; a joined call counts in full.
        encode_seconds: Encoding outputs.
        calls: Component calls it made.
        joined_calls: Calls that were joined with those of other generations.
        max_joined: Most generations that shared one of its calls, itself included.
        phases: Seconds in each phase, such as "text_encode", "denoise" and "decode".
        batch_sizes: Its calls by how many generations shared them, itself included.
        recoveries: What helped calls that had run out of memory, such as "split" or "tile"; empty when memory sufficed.
    """

    queue_seconds: float
    run_seconds: float
    device_seconds: float
    encode_seconds: float
    calls: int
    joined_calls: int
    max_joined: int
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)
    batch_sizes: Mapping[int, int] = dataclasses.field(default_factory=dict)
    recoveries: tuple[str, ...] = ()


class PipelineOutput:
    """The result of `pipe(...)`, as diffusers' `BaseOutput`.

    Fields are attributes, keys, and positions that skip those that are None: `result.images`, `result["images"]` and
    `result[0]` are the same.

    Attributes:
        images: A list of PIL images; for `output_type` "np" an array of shape (count, height, width, channels) in
            0…1, for "pt" a tensor of shape (count, channels, height, width), for "latent" a tensor of the family's own
            shape.
        frames: A list of videos, each a list of PIL images; for `output_type` "np" and "pt" one array or tensor of all
            videos; for `media_type` "video/mp4" a list of files, each with `data` and `save(path)`.
        audios: An array or tensor of shape (count, time) or (count, channel, time), as the pipeline has it; for
            `media_type` "audio/wav" a list of files, each with `data` and `save(path)`.
        seeds: What its random generators started from, one for the whole call or one per image. Empty when the caller
            gave generators.
        timings: Where the time went.
        manifest: How they were made: enough to make them again.
    """

    images: Any
    frames: Any
    audios: Any
    seeds: tuple[int, ...]
    timings: Timings
    manifest: Manifest

    def __init__(self, fields: dict[str, Any], *, seeds: tuple[int, ...], timings: Timings, manifest: Manifest) -> None:
        self._fields = fields
        self.seeds = seeds
        self.timings = timings
        self.manifest = manifest

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__.get("_fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(
            f"The pipeline returned no {name!r}; there is " + ", ".join([*fields, "seeds", "timings", "manifest"])
        )

    def __getitem__(self, key: str | int | slice) -> Any:
        return self._present()[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())

    def __contains__(self, name: object) -> bool:
        return name in self._present()

    def __repr__(self) -> str:
        fields = [f"{name}={reprlib.repr(value)}" for name, value in self._fields.items()]
        return f"PipelineOutput({', '.join([*fields, f'seeds={self.seeds}'])})"

    def keys(self) -> KeysView[str]:
        return self._present().keys()

    def values(self) -> ValuesView[Any]:
        return self._present().values()

    def items(self) -> ItemsView[str, Any]:
        return self._present().items()

    def to_tuple(self) -> tuple[Any, ...]:
        """All fields that are not None, in order."""
        return tuple(self._present().values())

    def all_fields(self) -> tuple[Any, ...]:
        """All fields, in order: what diffusers returns for `return_dict=False`."""
        return tuple(self._fields.values())

    def embed_manifest(self) -> None:
        """Has each PIL image write its manifest into the file that it is saved to."""
        for name, value in self._fields.items():
            if isinstance(value, list) and all(isinstance(item, Image.Image) for item in value):
                self._fields[name] = [manifest.embed(item, self.manifest, index) for index, item in enumerate(value)]

    def _present(self) -> dict[str, Any]:
        return {name: value for name, value in self._fields.items() if value is not None}


def assemble(outputs: Sequence[pb.Output], summary: pb.Summary, *, is_pil: bool) -> PipelineOutput:
    """Puts what arrived in pieces together."""
    fields: dict[str, Any] = dict.fromkeys(summary.field_names)
    for output in sorted(outputs, key=lambda output: output.index):
        value, is_whole = _decode(output, is_pil=is_pil)
        if is_whole:
            fields[output.field] = value
            continue
        listed = fields[output.field] = fields.get(output.field) or []
        if output.HasField("group"):
            # Sorted by their positions, the lists of a field begin one after the other.
            listed += [[] for _ in range(output.group + 1 - len(listed))]
            listed = listed[output.group]
        listed.append(value)
    for name, field in summary.fields.items():
        fields[name] = media.unpack(from_proto(field))
    timings = Timings(
        queue_seconds=from_duration(summary.queue_duration),
        run_seconds=from_duration(summary.run_duration),
        device_seconds=from_duration(summary.device_duration),
        encode_seconds=from_duration(summary.encode_duration),
        calls=summary.call_count,
        joined_calls=summary.joined_call_count,
        max_joined=summary.max_joined_requests,
        phases={name: from_duration(duration) for name, duration in summary.phase_durations.items()},
        batch_sizes=dict(sorted(summary.batch_sizes.items())),
        recoveries=tuple(summary.recoveries),
    )
    return PipelineOutput(fields, seeds=tuple(summary.seeds), timings=timings, manifest=Manifest(summary.manifest))


def _decode(output: pb.Output, *, is_pil: bool) -> tuple[Any, bool]:
    value = media.unpack(artifact_from_proto(output.artifact))
    if is_pil and output.artifact.media_type == NDARRAY:
        return _image(value), False
    return value, not isinstance(value, Image.Image | Artifact)


def _image(pixels: np.ndarray[Any, Any]) -> Image.Image:
    # Pillow wants grey images without a dimension for their one channel.
    return Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)

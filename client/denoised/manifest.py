"""How an output was made: enough to make it again, and to say what differs when that fails.

    result = pipe("a red apple", embed_manifest=True)
    print(result.manifest.seeds, result.manifest.adapters)
    result.images[0].save("apple.png")  # `denoised reproduce apple.png` makes it again

A picture carries it as text: PNG in an iTXt chunk named "denoised", JPEG and WebP as the EXIF tag ImageDescription.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from PIL import Image, PngImagePlugin

from .errors import InvalidMediaError
from .fingerprint import fingerprint
from .v1 import generation_service_pb2 as pb
from .values import from_proto

KEY = "denoised"
FORMAT = 1
# EXIF ImageDescription.
DESCRIPTION = 0x010E


class Manifest:
    """How the outputs of one generation were made.

    Attributes:
        message: All of it, as the daemon sent it.
    """

    def __init__(self, message: pb.Manifest) -> None:
        self.message = message

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.message == other.message

    def __repr__(self) -> str:
        return f"<Manifest of {self.pipeline_class} from {self.repo_id!r}, seeds {self.seeds}>"

    @property
    def pipeline_class(self) -> str:
        """Name of the diffusers class."""
        return self.message.pipeline_class

    @property
    def repo_id(self) -> str:
        """Where the weights came from."""
        return self.message.spec.repo_id

    @property
    def revision(self) -> str:
        """The commit of the repository; empty for directories."""
        return self.message.spec.revision

    @property
    def components(self) -> dict[str, str]:
        """Content digests of the pipeline's parts by role."""
        return {part.role: part.digest for part in self.message.components}

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the random generators; empty when the caller gave generators."""
        return tuple(self.message.seeds)

    @property
    def generator_device(self) -> str:
        """Kind of device that the random numbers were drawn on."""
        return self.message.generator_device

    @property
    def noise_scheduler(self) -> tuple[str, dict[str, Any]] | None:
        """Class name and configuration of the noise scheduler."""
        if not self.message.HasField("noise_scheduler"):
            return None
        scheduler = self.message.noise_scheduler
        return scheduler.class_name, {name: from_proto(value) for name, value in scheduler.config.entries.items()}

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the call. Images and tensors are None here, and in `media`."""
        return {name: from_proto(value) for name, value in self.message.arguments.items()}

    @property
    def media(self) -> dict[str, tuple[str, str]]:
        """Kind and digest of each image and tensor among the arguments, by its place: "image", "control_image[0]"."""
        return {place: (found.kind, found.digest) for place, found in self.message.media.items()}

    @property
    def adapters(self) -> dict[str, Any]:
        """Scales of the LoRAs in force, by the digests of their files, for those that the call asked for."""
        chosen = zip(self.message.adapters.adapters, self.message.adapter_digests, strict=True)
        return {digest: from_proto(adapter.scale) for adapter, digest in chosen}

    @property
    def loaded_adapters(self) -> dict[str, str]:
        """Digests of the LoRAs that the pipeline had loaded, by name."""
        return {adapter.name: adapter.digest for adapter in self.message.loaded_adapters}

    @property
    def joined(self) -> bool:
        """Whether calls were joined with those of others: the outputs may then differ by rounding."""
        return self.message.joined

    @property
    def device_kind(self) -> str:
        """ "cpu" or "cuda"."""
        return self.message.device_kind

    @property
    def library_versions(self) -> dict[str, str]:
        """Versions of the libraries that decide what comes out, and of denoised."""
        return {**self.message.library_versions, "denoised": self.message.version}

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return json_format.MessageToDict(self.message, preserving_proto_field_name=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """Raises ValueError for what is none."""
        message = pb.Manifest()
        try:
            json_format.ParseDict(dict(data), message, ignore_unknown_fields=True)
        except json_format.ParseError as error:
            raise ValueError(f"it is no manifest: {error}") from error
        return cls(message)

    def differences(self, other: Manifest) -> list[str]:
        """What decides the bits and is not the same in the other, in words."""
        maps = (
            ("component", self.components, other.components),
            ("adapter", self.loaded_adapters, other.loaded_adapters),
            ("version of", self.library_versions, other.library_versions),
        )
        found = [
            f"{what} {name}: {_short(here.get(name))} then, {_short(there.get(name))} now"
            for what, here, there in maps
            for name in sorted({*here, *there})
            if here.get(name) != there.get(name)
        ]
        pairs = {
            "adapters of the call": ([*self.adapters], [*other.adapters]),
            "noise scheduler": (self.noise_scheduler, other.noise_scheduler),
            "kind of device": (self.device_kind, other.device_kind),
            "device": (self.message.device_name, other.message.device_name),
            "pipeline class": (self.pipeline_class, other.pipeline_class),
            "images and tensors": (self.media, other.media),
        }
        return found + [f"{what}: {here} then, {there} now" for what, (here, there) in pairs.items() if here != there]


@dataclass(frozen=True, slots=True)
class Embedded:
    """What a picture says of itself: its manifest, which of the images it is, and the digest of its pixels then."""

    manifest: Manifest
    index: int
    pixels: str


class _Picture(Image.Image):
    """An image that is saved with its manifest. What is made of it, as by `resize`, is a plain image."""

    manifest_text: str

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        kind = format or Image.registered_extensions().get(Path(str(getattr(fp, "name", fp))).suffix.lower()) or ""
        match kind.upper():
            case "PNG":
                info = params.setdefault("pnginfo", PngImagePlugin.PngInfo())
                info.add_itxt(KEY, self.manifest_text, zip=True)
            case "JPEG" | "WEBP" if "exif" not in params:
                exif = Image.Exif()
                exif[DESCRIPTION] = self.manifest_text
                params["exif"] = exif
        super().save(fp, format, **params)


def embed(image: Image.Image, manifest: Manifest, index: int) -> Image.Image:
    """The same image, which writes its manifest into PNG, JPEG and WebP files when it is saved."""
    found = fingerprint(image)
    assert found is not None, "an image"
    said = {KEY: FORMAT, "index": index, "pixels": found[1], "manifest": manifest.to_dict()}
    picture = image.copy()
    picture.__class__ = _Picture
    picture.manifest_text = json.dumps(said, separators=(",", ":"))  # type: ignore[attr-defined]
    return picture


def read(image: Image.Image) -> Embedded:
    """The manifest of a picture that was opened from a file. Raises InvalidMediaError when it has none."""
    text = image.info.get(KEY) or getattr(image, "manifest_text", None) or image.getexif().get(DESCRIPTION)
    try:
        said = json.loads(str(text))
        return Embedded(Manifest.from_dict(said["manifest"]), int(said["index"]), str(said["pixels"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidMediaError(
            "The picture has no manifest.",
            hint="Make it with embed_manifest=True or --embed-manifest; editors drop it when they save.",
        ) from error


def _short(value: str | None) -> str:
    return "none" if value is None else value if len(value) < 24 else f"{value[:19]}…"

"""Weight files of a component: which they are, how large they get, and what identifies them. Reads headers only."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denoised.errors import DamagedWeightsError

SAFETENSORS_ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
}
# The largest header that safetensors itself accepts.
MAX_HEADER_BYTES = 100_000_000
SHARD = re.compile(r"-\d{5}-of-\d{5}")
SUFFIXES = (".safetensors", ".bin")


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One file of weights, with its size in memory once it is cast to the dtype that was asked for."""

    path: Path
    memory_bytes: int

    @property
    def variant(self) -> str:
        """ "fp16" of "model.fp16-00001-of-00002.safetensors"; empty for plain files."""
        return _variant(self.path)


def find(folder: Path, *, variant: str, use_safetensors: bool | None, item_bytes: int) -> list[WeightFile]:
    """Weight files that diffusers would read in a component's folder; empty for a component without weights.

    Args:
        variant: As in `from_pretrained`: files of the variant where there are any, else the plain ones.
        use_safetensors: None prefers safetensors.
        item_bytes: Size of an element after the cast; applies to floating-point tensors.
    """
    suffixes = SUFFIXES if use_safetensors is None else SUFFIXES[:1] if use_safetensors else SUFFIXES[1:]
    for suffix in suffixes:
        paths = sorted(path for path in folder.glob(f"*{suffix}") if path.is_file())
        chosen = [path for path in paths if variant and _variant(path) == variant]
        chosen = chosen or [path for path in paths if not _variant(path)]
        if chosen:
            return [_measure(path, item_bytes) for path in chosen]
    return []


def _variant(path: Path) -> str:
    return SHARD.sub("", path.stem).partition(".")[2]


def _measure(path: Path, item_bytes: int) -> WeightFile:
    if path.suffix != ".safetensors":
        return WeightFile(path, path.stat().st_size)
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, MAX_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it should have {8 + length + end:,} bytes and has {size:,}")
        return WeightFile(path, sum(_tensor_bytes(tensor, item_bytes) for tensor in header.values()))
    except (ValueError, KeyError, TypeError, struct.error, AttributeError) as error:
        reason = str(error) if type(error) is ValueError else "its header cannot be read"
        raise DamagedWeightsError(
            f"The weight file {path.parent.name}/{path.name} is damaged: {reason}.",
            hint="Download or save the checkpoint again.",
        ) from None


def _tensor_bytes(tensor: Mapping[str, Any], item_bytes: int) -> int:
    dtype = str(tensor["dtype"])
    size = item_bytes if dtype.startswith(("F", "BF")) else SAFETENSORS_ITEM_BYTES.get(dtype, 1)
    return int(math.prod(tensor["shape"]) * size)


def _configuration(path: Path) -> str:
    """What decides the module, in one spelling; who saved it with which version, and from where, does not."""
    if not path.is_file():
        return ""
    config = json.loads(path.read_text())
    dropped = {"transformers_version", "torch_dtype", "dtype"}
    return json.dumps({k: v for k, v in config.items() if not k.startswith("_") and k not in dropped}, sort_keys=True)


class Digests:
    """Content digests of files, each computed once for as long as the file stays as it is."""

    def __init__(self, hub_cache: Path) -> None:
        self._hub_cache = hub_cache
        self._known: dict[tuple[str, int, int], str] = {}

    def of_file(self, path: Path) -> str:
        """SHA-256, hexadecimal. The Hub's cache names blobs by it, so those are not read; other names prove nothing."""
        real = path.resolve()
        is_blob = real.parent.name == "blobs" and real.is_relative_to(self._hub_cache)
        if is_blob and re.fullmatch(r"[0-9a-f]{64}", real.name):
            return real.name
        state = real.stat()
        key = (str(real), state.st_size, state.st_mtime_ns)
        if key not in self._known:
            with real.open("rb") as file:
                self._known[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._known[key]

    def of_component(self, files: Iterable[Path], *, config: Path, class_name: str, dtype: str) -> str:
        """Identity of a component: the same for the same weights, class, configuration and element type."""
        identity = hashlib.sha256()
        for part in (class_name, dtype, _configuration(config)):
            identity.update(f"{part}\n".encode())
        for path in sorted(files, key=lambda path: path.name):
            # Without the variant: the same bytes are the same weights under any name.
            identity.update(f"{self.of_file(path)}\n".encode())
        return f"sha256:{identity.hexdigest()}"

"""Weight files of a component: which they are, and how large they get. Reads headers only."""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
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
TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# The largest header that safetensors itself accepts.
MAX_HEADER_BYTES = 100_000_000
SHARD = re.compile(r"-\d{5}-of-\d{5}")
SUFFIXES = (".safetensors", ".bin")


def find(folder: Path, *, variant: str, use_safetensors: bool | None) -> list[Path]:
    """Weight files that diffusers would read in a component's folder; empty for a component without weights."""
    names = (path.name for path in folder.glob("*") if path.is_file())
    return [folder / name for name in choose(names, variant=variant, use_safetensors=use_safetensors)]


def choose(names: Iterable[str], *, variant: str, use_safetensors: bool | None) -> list[str]:
    """Of the files in a folder those with weights that diffusers would read.

    Args:
        names: All of them.
        variant: As in `from_pretrained`: files of the variant where there are any, else the plain ones.
        use_safetensors: None prefers safetensors.
    """
    names = sorted(names)
    suffixes = SUFFIXES if use_safetensors is None else SUFFIXES[:1] if use_safetensors else SUFFIXES[1:]
    for suffix in suffixes:
        found = [name for name in names if name.endswith(suffix)]
        chosen = [name for name in found if variant and variant_of(name) == variant]
        chosen = chosen or [name for name in found if not variant_of(name)]
        if chosen:
            return chosen
    return []


def variant_of(name: str) -> str:
    """ "fp16" of "model.fp16-00001-of-00002.safetensors"; empty for plain files."""
    return SHARD.sub("", name.rpartition(".")[0]).partition(".")[2]


def is_commit(revision: str) -> bool:
    """Whether it is the full name of a commit."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def dtype_of(paths: Iterable[Path]) -> str:
    """Element type of the first floating-point tensor, as torch names it; float32 for pickled files, unread."""
    for path in paths:
        if path.suffix == ".safetensors":
            for tensor in header(path).values():
                if (found := TORCH_NAMES.get(str(tensor.get("dtype")))) is not None:
                    return found
    return "float32"


def stored_bytes(paths: Iterable[Path]) -> dict[str, int]:
    """Bytes of tensors by safetensors' element types; pickled files are left out."""
    stored = Counter[str]()
    for path in paths:
        if path.suffix == ".safetensors":
            for tensor in header(path).values():
                begin, end = tensor["data_offsets"]
                stored[str(tensor["dtype"])] += end - begin
    return dict(stored)


def memory_bytes(path: Path, item_bytes: int) -> int:
    """Size in memory once its floating-point tensors are cast to elements of this size."""
    if path.suffix != ".safetensors":
        return path.stat().st_size
    return sum(_tensor_bytes(tensor, item_bytes) for tensor in header(path).values())


def header(path: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors. Raises DamagedWeightsError for one that is not whole."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, MAX_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            found = json.loads(file.read(length))
        found.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in found.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it should have {8 + length + end:,} bytes and has {size:,}")
        for tensor in found.values():
            _tensor_bytes(tensor, 1)
    except (ValueError, KeyError, TypeError, struct.error, AttributeError) as error:
        reason = str(error) if type(error) is ValueError else "its header cannot be read"
        raise DamagedWeightsError(
            f"The weight file {path.parent.name}/{path.name} is damaged: {reason}.",
            hint="Download or save the checkpoint again.",
        ) from None
    return dict(found)


def _tensor_bytes(tensor: Mapping[str, Any], item_bytes: int) -> int:
    dtype = str(tensor["dtype"])
    size = item_bytes if dtype.startswith(("F", "BF")) else SAFETENSORS_ITEM_BYTES.get(dtype, 1)
    return int(math.prod(tensor["shape"]) * size)

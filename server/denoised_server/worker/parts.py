"""Parts of a load that have weights: what identifies them, how large they get, and where they come from."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from denoised_server.messages import Spec
from diffusers.pipelines import pipeline_utils
from torch import nn

from . import classes, weights
from .digests import Digests
from .dtypes import Dtypes

# Newer versions of the libraries warn about the old name.
DIFFUSERS_DTYPE = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"
TRANSFORMERS_DTYPE = "dtype" if int(transformers.__version__.partition(".")[0]) >= 5 else "torch_dtype"


@dataclass(frozen=True, slots=True)
class Part:
    """A component with weights. `memory_bytes` is its size once loaded, by the headers of its files.

    `variant` is that of its files, and empty for plain ones. `files` are those that have its weights.
    """

    role: str
    digest: str
    memory_bytes: int
    folder: Path
    class_name: str
    variant: str
    use_safetensors: bool | None
    dtype: torch.dtype
    files: tuple[Path, ...]

    def load(self) -> nn.Module:
        """The component by itself, as the class that its digest names."""
        component_class = classes.find(self.class_name, f"overrides[{self.role}].class_name")
        argument = DIFFUSERS_DTYPE if issubclass(component_class, diffusers.ModelMixin) else TRANSFORMERS_DTYPE
        options: dict[str, Any] = {argument: self.dtype, "variant": self.variant or None, "local_files_only": True}
        if self.use_safetensors is not None:
            options["use_safetensors"] = self.use_safetensors
        module: nn.Module = component_class.from_pretrained(str(self.folder), **options)
        return module.eval()


def files_of(folder: Path, index: Mapping[str, Any], spec: Spec) -> list[Path]:
    """Weight files that a checkpoint brings; those of parts that the spec overrides are left out."""
    return [
        file
        for role in index
        if role not in spec.overrides and role.isidentifier()
        for each in (folder / role, *_beside(folder / role))
        for file in weights.find(each, variant=spec.variant, use_safetensors=spec.use_safetensors)
    ]


def of_checkpoint(folder: Path, index: Mapping[str, Any], spec: Spec, dtypes: Dtypes, digests: Digests) -> list[Part]:
    """Parts that a checkpoint brings; those that the spec overrides are left out."""
    parts = []
    for role, entry in index.items():
        # Only what diffusers would look at: names of folders, with a library and a class.
        if role in spec.overrides or not role.isidentifier() or not isinstance(entry, list) or len(entry) != 2:
            continue
        if isinstance(entry[1], str):
            beside, dtype = _beside(folder / role), dtypes.of(role)
            part = of_folder(
                role, folder / role, entry[1], spec.variant, spec.use_safetensors, dtype, digests, beside=beside
            )
            parts += [part] if part is not None else []
    return parts


def of_folder(
    role: str,
    folder: Path,
    class_name: str,
    variant: str,
    use_safetensors: bool | None,
    dtype: torch.dtype | None,
    digests: Digests,
    *,
    beside: Iterable[Path] = (),
) -> Part | None:
    """The part in a folder, and in those beside it; None when there are no weights in it.

    Without an element type it gets that of its files.
    """
    files = [
        file
        for each in (folder, *beside)
        for file in weights.find(each, variant=variant, use_safetensors=use_safetensors)
    ]
    if not files:
        return None
    dtype = dtype or getattr(torch, weights.dtype_of(files))
    digest = digests.of_component(
        files, config=folder / "config.json", class_name=class_name, dtype=str(dtype).removeprefix("torch.")
    )
    size = sum(weights.memory_bytes(file, dtype.itemsize) for file in files)
    variant = weights.variant_of(files[0].name)
    return Part(role, digest, size, folder, class_name, variant, use_safetensors, dtype, tuple(files))


def _beside(folder: Path) -> Iterator[Path]:
    """Several ControlNets in one role lie beside each other: `controlnet`, `controlnet_1`, …"""
    for number in itertools.count(1):
        another = folder.with_name(f"{folder.name}_{number}")
        if not another.is_dir():
            return
        yield another

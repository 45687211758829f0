"""Parts of a load that have weights: what identifies them, how large they get, and where they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from denoised.errors import NotAPipelineError
from denoised_server.messages import ComponentSource, Spec
from diffusers.pipelines import pipeline_utils
from torch import nn

from . import weights
from .sources import Sources
from .weights import Digests

# Newer versions of the libraries warn about the old name.
DIFFUSERS_DTYPE = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"
TRANSFORMERS_DTYPE = "dtype" if int(transformers.__version__.partition(".")[0]) >= 5 else "torch_dtype"


@dataclass(frozen=True, slots=True)
class Part:
    """A component with weights. `memory_bytes` is its size once loaded, by the headers of its files."""

    role: str
    digest: str
    memory_bytes: int
    folder: Path
    class_name: str
    variant: str

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The component by itself, as the class that its digest names."""
        for library, argument in ((diffusers, DIFFUSERS_DTYPE), (transformers, TRANSFORMERS_DTYPE)):
            if (found := getattr(library, self.class_name, None)) is not None:
                options = {argument: dtype, "variant": self.variant or None, "local_files_only": True}
                module: nn.Module = found.from_pretrained(str(self.folder), **options)
                return module.eval()
        raise NotAPipelineError(
            f"The component for {self.role} is a {self.class_name}, which neither diffusers nor transformers has."
        )


def of_checkpoint(
    folder: Path, index: Mapping[str, Any], spec: Spec, dtype: torch.dtype, digests: Digests
) -> list[Part]:
    """Parts that a checkpoint brings; those that the spec overrides are left out."""
    parts = []
    for role, entry in index.items():
        # Only what diffusers would look at: names of folders, with a library and a class.
        if role in spec.overrides or not role.isidentifier() or not isinstance(entry, list) or len(entry) != 2:
            continue
        if isinstance(entry[1], str):
            part = _part(role, folder / role, entry[1], spec.variant, spec.use_safetensors, dtype, digests)
            parts += [part] if part is not None else []
    return parts


def of_overrides(spec: Spec, dtype: torch.dtype, sources: Sources, digests: Digests) -> list[Part]:
    """Parts that the spec takes from elsewhere."""
    parts = []
    for role, override in spec.overrides.items():
        if not isinstance(override, ComponentSource):
            continue
        source = sources.component(
            override.repo_id, subfolder=override.subfolder, revision=override.revision, variant=override.variant
        )
        config = json.loads((source.folder / "config.json").read_text())
        class_name = config.get("_class_name") or next(iter(config.get("architectures") or ["?"]))
        part = _part(role, source.folder, class_name, override.variant, None, dtype, digests)
        if part is None:
            raise NotAPipelineError(f"The component for {role} has no weight files.")
        parts.append(part)
    return parts


def _part(
    role: str,
    folder: Path,
    class_name: str,
    variant: str,
    use_safetensors: bool | None,
    dtype: torch.dtype,
    digests: Digests,
) -> Part | None:
    files = weights.find(folder, variant=variant, use_safetensors=use_safetensors, item_bytes=dtype.itemsize)
    if not files:
        return None
    digest = digests.of_component(
        [file.path for file in files],
        config=folder / "config.json",
        class_name=class_name,
        dtype=str(dtype).removeprefix("torch."),
    )
    return Part(role, digest, sum(file.memory_bytes for file in files), folder, class_name, variant)

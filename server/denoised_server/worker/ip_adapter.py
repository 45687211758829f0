"""The image encoder that an IP-Adapter needs: a component like others, shared by content."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from denoised.errors import AdapterMismatchError, NotAPipelineError, RepoNotFoundError
from denoised_server.messages import Access, AdapterSource, ComponentSource
from torch import nn

from . import weights
from .digests import Digests
from .downloads import Downloads
from .parts import TRANSFORMERS_DTYPE
from .sources import Sources


@dataclass(frozen=True, slots=True)
class ImageEncoder:
    """An image encoder in its folder. `memory_bytes` is its size once loaded, by the headers of its files."""

    folder: Path
    class_name: str
    digest: str
    memory_bytes: int
    files: tuple[Path, ...]

    def load(self, dtype: torch.dtype) -> nn.Module:
        kind: Any = getattr(transformers, self.class_name)
        module: nn.Module = kind.from_pretrained(str(self.folder), **{TRANSFORMERS_DTYPE: dtype}, local_files_only=True)
        return module.eval()


def find(source: AdapterSource, folder: str, dtype: torch.dtype, sources: Sources, digests: Digests) -> ImageEncoder:
    """The encoder in a folder beside the adapter's file, or anywhere in its repository when the folder has a slash.

    Raises AdapterMismatchError when there is none.
    """
    subfolder = folder if "/" in folder else "/".join(filter(None, (source.subfolder, folder)))
    try:
        wanted = ComponentSource(source.repo_id, subfolder, source.revision)
        fetched = sources.fetch_component(wanted, Downloads(Access(), lambda progress: None, lambda: None))
        found = sources.component(fetched, ["config.json"])
        files = weights.find(found.folder, variant="", use_safetensors=None)
        config = json.loads((found.folder / "config.json").read_text())
    except (NotAPipelineError, RepoNotFoundError, OSError, ValueError):
        files, config = [], {}
    if not files:
        raise AdapterMismatchError(
            f"The IP-Adapter's image encoder is not in {subfolder!r} of {source.repo_id!r}.",
            hint="Name its folder with image_encoder_folder; or None, and send ip_adapter_image_embeds with each call.",
        )
    # As diffusers chooses, whatever the file says that it was part of.
    is_siglip = str(config.get("model_type", "")).startswith("siglip")
    class_name = "SiglipVisionModel" if is_siglip else "CLIPVisionModelWithProjection"
    digest = digests.of_component(
        files,
        config=found.folder / "config.json",
        class_name=class_name,
        dtype=str(dtype).removeprefix("torch."),
    )
    size = sum(weights.memory_bytes(file, dtype.itemsize) for file in files)
    return ImageEncoder(found.folder, class_name, digest, size, tuple(files))

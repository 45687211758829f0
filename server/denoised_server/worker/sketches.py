"""Repositories of the Hub in outline: their configurations, and of their weight files the headers alone.

A sketch has the layout of the Hub's cache, with sparse files as long as the real ones, so that whatever finds and
measures weights there needs not know that they have not come.
"""

from __future__ import annotations

import json
import logging
import struct
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from denoised_server.messages import Access, ComponentSource, LoadProgress, Spec
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub import errors as hub_errors

from . import weights
from .downloads import Downloads

logger = logging.getLogger(__name__)

# What says which components there are and how they are built.
DESCRIPTIONS = ("model_index.json", "config.json", "README.md")


class Sketches(Downloads):
    """Draws what its base class would download; use it with `with`, which wipes it out again.

    Attributes:
        cache: A stand-in for the Hub's cache.
        download_bytes: What a load would have to download.
    """

    def __init__(self, access: Access, hub_cache: Path, check_cancelled: Callable[[], None]) -> None:
        super().__init__(access, _tell_nobody, check_cancelled)
        self._token, self._hub_cache = access.token or None, hub_cache
        self._folder = tempfile.TemporaryDirectory(prefix="denoised-plan-")
        self.cache = Path(self._folder.name).resolve()
        self.download_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._folder.cleanup()

    def pipeline(self, spec: Spec) -> str:
        prefix = f"{spec.subfolder}/" if spec.subfolder else ""

        def choose(names: list[str]) -> list[str]:
            inside = (PurePosixPath(name.removeprefix(prefix)) for name in names if name.startswith(prefix))
            # Components are folders beside model_index.json; what is overridden stays where it is.
            folders = sorted({path.parts[0] for path in inside if len(path.parts) == 2} - spec.overrides.keys())
            return [
                name
                for folder in folders
                for name in _weights(names, f"{prefix}{folder}/", spec.variant, spec.use_safetensors)
            ]

        return self._sketch(spec.repo_id, spec.revision, choose)

    def single_file(self, spec: Spec) -> str:
        name = str(PurePosixPath(spec.subfolder, spec.single_file))
        return self._sketch(spec.repo_id, spec.revision, lambda names: [each for each in names if each == name])

    def configuration(self, source: ComponentSource) -> str:
        # What a single file lacks comes with its configuration.
        return self.pipeline(Spec(source.repo_id, revision=source.revision, subfolder=source.subfolder))

    def component(self, source: ComponentSource) -> str:
        folder = f"{source.subfolder}/" if source.subfolder else ""
        return self._sketch(
            source.repo_id,
            source.revision,
            lambda names: _weights(names, folder, source.variant, source.use_safetensors),
        )

    def _sketch(self, repo_id: str, revision: str, choose: Callable[[list[str]], list[str]]) -> str:
        def draw(local_files_only: bool) -> str:
            if local_files_only:
                raise hub_errors.LocalEntryNotFoundError("a sketch is drawn from the Hub")
            api = HfApi(token=self._token)
            info = api.model_info(repo_id, revision=revision or None, files_metadata=True)
            files = {file.rfilename: file for file in info.siblings or ()}
            folder = self.cache / f"models--{repo_id.replace('/', '--')}"
            for name in files:
                if PurePosixPath(name).name in DESCRIPTIONS:
                    hf_hub_download(repo_id, name, revision=info.sha, token=self._token, cache_dir=self.cache)
            for name in choose(sorted(files)):
                blob = self._blob(folder.name, files[name], partial(self._header, repo_id, info.sha, name))
                link = folder / "snapshots" / str(info.sha) / name
                if not link.exists():
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(blob)
            return str(folder / "snapshots" / str(info.sha))

        return self._run(repo_id, revision, draw, Path.is_dir)

    def _blob(self, repository: str, file: Any, header: Callable[[], tuple[bytes, int]]) -> Path:
        """The weight file that the cache has, or one like it that has nothing after its header."""
        digest = file.lfs.sha256 if file.lfs is not None else file.blob_id
        held, blob = (cache / repository / "blobs" / str(digest) for cache in (self._hub_cache, self.cache))
        if held.is_file():
            return held
        if not blob.exists():
            size = int(file.size or 0)
            self.download_bytes += size
            blob.parent.mkdir(parents=True, exist_ok=True)
            with blob.open("wb") as sparse:
                if file.rfilename.endswith(".safetensors"):
                    head, end = header()
                    size = sparse.write(head) + end
                sparse.truncate(size)
        return blob

    def _header(self, repo_id: str, commit: str | None, name: str) -> tuple[bytes, int]:
        """The head of a file, and how many bytes of tensors follow it."""
        found = HfApi(token=self._token).parse_safetensors_file_metadata(repo_id, name, revision=commit)
        tensors = {
            key: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": tensor.data_offsets}
            for key, tensor in found.tensors.items()
        }
        text = json.dumps(tensors).encode()
        end = max((tensor.data_offsets[1] for tensor in found.tensors.values()), default=0)
        return struct.pack("<Q", len(text)) + text, end


def _weights(names: Iterable[str], folder: str, variant: str, use_safetensors: bool | None) -> list[str]:
    """Weight files directly in a folder that would be read, or those of another kind that are there instead."""
    inside = [name.removeprefix(folder) for name in names if name.startswith(folder)]
    inside = [name for name in inside if "/" not in name]
    for kind in (use_safetensors, None):
        if chosen := weights.choose(inside, variant=variant, use_safetensors=kind):
            return [folder + name for name in chosen]
    return []


def _tell_nobody(progress: LoadProgress) -> None:
    """What is drawn takes no time worth telling of."""

"""Rules for sources: what whoever runs the daemon lets clients load, and what may be in it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from denoised.errors import SourceNotAllowedError
from diffusers import pipelines
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

COMMIT = re.compile(r"[0-9a-f]{40}")
# Arguments of `from_pretrained` that change what is read, or that let code of a checkpoint run.
READING_OPTIONS = frozenset(
    {
        "trust_remote_code",
        "code_revision",
        "custom_pipeline",
        "custom_revision",
        "revision",
        "subfolder",
        "token",
        "use_auth_token",
        "proxies",
        "mirror",
        "force_download",
        "local_files_only",
        "gguf_file",
        "pretrained_model_name_or_path",
    }
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.msgpack", "*.h5")


@dataclass(frozen=True, slots=True)
class SourceRules:
    """What may be loaded. Directories are resolved.

    `dirs` may be named, and links inside them may lead to each other and to `hub_cache`. `repos` are names on the Hub
    with * and ?; none at all means all of them. With `pinned`, repositories come by commit only.
    """

    dirs: tuple[Path, ...]
    hub_cache: Path
    repos: tuple[str, ...] = ()
    pinned: bool = False
    allow_pickle: bool = False

    def check_named(self, path: Path, name: str) -> None:
        """Whether a client may name this path. The cache has all repositories, so with rules for those it may not."""
        self._check_inside(path, name, self.dirs if self.repos or self.pinned else (*self.dirs, self.hub_cache))

    def check_link(self, path: Path, name: str) -> None:
        """Whether a link in what a client named may lead here."""
        self._check_inside(path, name, (*self.dirs, self.hub_cache))

    def check_repo(self, repo_id: str, revision: str) -> None:
        """Whether a repository may be had from the Hub, in this revision."""
        if self.repos and not any(fnmatchcase(repo_id, pattern) for pattern in self.repos):
            raise SourceNotAllowedError(
                f"The daemon may not load the repository {repo_id!r}.",
                hint="Whoever runs the daemon adds it, or its organisation, to the setting allow_repos.",
            )
        if self.pinned and not COMMIT.fullmatch(revision):
            raise SourceNotAllowedError(
                f"The daemon loads {repo_id!r} by commit only.",
                hint="Give the 40 hexadecimal digits of the commit as `revision`.",
            )

    def use_safetensors(self, asked: bool | None) -> bool | None:
        """What to look for, given what was asked for: without pickles, safetensors and nothing else."""
        if self.allow_pickle:
            return asked
        if asked is False:
            raise SourceNotAllowedError(
                "The daemon reads weights from safetensors files only.", hint="Leave use_safetensors out."
            )
        return True

    def check_checkpoint(self, folder: Path, index: Mapping[str, Any]) -> None:
        """Whether what a checkpoint's model_index.json names may be loaded. Code that it brings is never run."""
        for role, entry in index.items():
            # Where diffusers looks for classes: its own modules, and libraries whose loading it knows.
            if isinstance(entry, list) and entry and isinstance(entry[0], str) and not _is_known_library(entry[0]):
                raise SourceNotAllowedError(
                    f"The checkpoint takes its {role[:64]} from {entry[0][:64]!r}, which is code that does not come "
                    "with diffusers or transformers.",
                    hint="The daemon runs no code from checkpoints. Override the component with another one.",
                )
            if isinstance(entry, list) and role.isidentifier():
                self.check_weights(folder / role)

    def check_weights(self, folder: Path) -> None:
        """Whether the weights in a component's folder are of a kind that may be read."""
        if self.allow_pickle or any(folder.glob("*.safetensors")):
            return
        if any(path for pattern in PICKLES for path in folder.glob(pattern)):
            raise SourceNotAllowedError(
                f"The weights of {folder.name} are in pickled files only, which may run code when they are read.",
                hint="Convert them to safetensors, or set the daemon's allow_pickle if you trust whoever made them.",
            )

    def _check_inside(self, path: Path, name: str, roots: Iterable[Path]) -> None:
        if not any(path.is_relative_to(root) for root in roots):
            raise SourceNotAllowedError(
                f"The daemon may not read {name!r}.", hint="Start it with `--allow-dir` for a directory above."
            )


def check_options(options: Iterable[str], field: str) -> None:
    """Whether a client may hand these on to `from_pretrained`: none that say what to read, and from where."""
    for name in options:
        if name in READING_OPTIONS or name.endswith(("_file", "_path", "_dir")):
            raise SourceNotAllowedError(
                f"{field}.config: {name[:64]!r} is not the caller's to set.",
                hint="Name the folder of the component; what is in it is read.",
            )


def _is_known_library(name: str) -> bool:
    # A module of diffusers may be named by its path, if it is in use.
    is_own = name.startswith("diffusers.") and name in sys.modules
    return name in LOADABLE_CLASSES or hasattr(pipelines, name) or is_own

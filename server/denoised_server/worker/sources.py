"""Where weights may come from: embedded models, allowed directories, the Hugging Face Hub."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from denoised.errors import (
    DenoisedError,
    InvalidFieldError,
    NotAPipelineError,
    RepoNotFoundError,
    SourceNotAllowedError,
)
from denoised_server import demo
from denoised_server.messages import Access, AdapterSource, ComponentSource, Derivation, Override, Recipe, Spec
from diffusers.pipelines.pipeline_loading_utils import CONNECTED_PIPES_KEYS
from huggingface_hub import ModelCard
from huggingface_hub.constants import HF_HUB_CACHE
from yaml import YAMLError

from . import families
from .downloads import Downloads
from .source_rules import SourceRules

EMBEDDED = {"demo": demo.CHECKPOINT}
ADAPTER_NAMES = ("pytorch_lora_weights.safetensors", "learned_embeds.safetensors")
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint on this machine. `revision` is the Hub's commit; empty for directories and embedded models."""

    folder: Path
    revision: str = ""


class Sources:
    """Resolves what callers name. Callers cannot reach a directory outside the allowed ones, by links neither."""

    hub_cache = Path(HF_HUB_CACHE).expanduser().resolve()

    def __init__(
        self, allowed: Iterable[str], *, repos: Iterable[str] = (), pinned: bool = False, allow_pickle: bool = False
    ) -> None:
        dirs = tuple(root.expanduser().resolve() for root in (*map(Path, allowed), *EMBEDDED.values()))
        self.rules = SourceRules(dirs, self.hub_cache, tuple(repos), pinned, allow_pickle)

    def with_cache(self, hub_cache: Path) -> Sources:
        """The same rules over another cache of the Hub's, into which `fetch` is to bring what is looked at."""
        other = copy.copy(self)
        other.hub_cache = hub_cache
        other.rules = replace(self.rules, dirs=(*self.rules.dirs, self.hub_cache), hub_cache=hub_cache)
        return other

    def fetch(self, recipe: Recipe, downloads: Downloads) -> Recipe:
        """Downloads what of the recipe is on the Hub, and returns the recipe with the commits it is at."""
        spec = recipe.spec
        if self._is_remote(spec):
            wanted = replace(spec, use_safetensors=self.rules.use_safetensors(spec.use_safetensors))
            download = downloads.single_file if spec.single_file else downloads.pipeline
            spec = replace(spec, revision=download(wanted))
        if not spec.single_file:
            self._fetch_connected(spec, downloads)
        if (config := spec.config_source) is not None and self._is_remote(config):
            spec = replace(spec, config_source=replace(config, revision=downloads.configuration(config)))
        spec = replace(spec, overrides=self._fetch_overrides(spec.overrides, downloads))
        return replace(
            recipe, spec=spec, derivations=tuple(self.fetch_derivation(step, downloads) for step in recipe.derivations)
        )

    def _fetch_connected(self, spec: Spec, downloads: Downloads) -> None:
        """What a checkpoint's README names on the Hub, if the pipeline is one that is made of it."""
        folder = self._find(spec.repo_id, spec.revision).folder / spec.subfolder
        try:
            class_name = str(json.loads((folder / "model_index.json").read_text())["_class_name"])
        except (OSError, ValueError, KeyError, TypeError):
            # Loading says what is wrong.
            return
        if not families.loads_connected(class_name, spec.task):
            return
        use_safetensors = self.rules.use_safetensors(spec.use_safetensors)
        for name in _connected(folder):
            if not Path(name).exists():
                _check_repo_id(name)
                self.rules.check_repo(name, "")
                downloads.connected(Spec(name, variant=spec.variant, use_safetensors=use_safetensors))

    def fetch_derivation(self, derivation: Derivation, downloads: Downloads) -> Derivation:
        return replace(derivation, overrides=self._fetch_overrides(derivation.overrides, downloads))

    def fetch_component(self, wanted: ComponentSource, downloads: Downloads) -> ComponentSource:
        if not wanted.repo_id or not self._is_remote(wanted):
            return wanted
        use_safetensors = self.rules.use_safetensors(wanted.use_safetensors)
        return replace(wanted, revision=downloads.component(replace(wanted, use_safetensors=use_safetensors)))

    def _is_remote(self, named: Spec | ComponentSource) -> bool:
        """Whether it is on the Hub, from where it may be had."""
        if self._local(named.repo_id) is not None:
            return False
        _check_repo_id(named.repo_id)
        self.rules.check_repo(named.repo_id, named.revision)
        return True

    def _fetch_overrides(self, overrides: Mapping[str, Override], downloads: Downloads) -> dict[str, Override]:
        def fetch(override: Override) -> Override:
            if isinstance(override, ComponentSource):
                return self.fetch_component(override, downloads)
            if isinstance(override, tuple):
                return tuple(
                    self.fetch_component(each, downloads) for each in override if isinstance(each, ComponentSource)
                )
            return override

        return {role: fetch(override) for role, override in overrides.items()}

    def pipeline(self, spec: Spec) -> Source:
        """The folder with a pipeline's model_index.json, which was fetched or is on this machine anyway."""
        named = spec.config_source or spec
        source = self._find(named.repo_id, named.revision)
        folder = self._inside(source, named.subfolder, named.repo_id)
        if not (folder / "model_index.json").is_file():
            what = "config for the single file" if spec.single_file else "folder"
            raise NotAPipelineError(
                f"{named.repo_id!r} is no diffusers pipeline: it has no model_index.json.",
                hint=f"Name a {what} that `save_pretrained` wrote, or a repository with the tag `diffusers`.",
            )
        return Source(folder, source.revision)

    def single_file(self, spec: Spec) -> Path:
        """The file with all weights of a pipeline, which was fetched or is on this machine anyway."""
        source = self._find(spec.repo_id, spec.revision)
        path = self._inside(source, str(Path(spec.subfolder, spec.single_file)), spec.repo_id)
        if not path.is_file():
            raise RepoNotFoundError(
                f"There is no file {spec.single_file!r} in {spec.repo_id!r}.", hint="Check repo_id and single_file."
            )
        return path

    def component(self, wanted: ComponentSource, configs: Iterable[str]) -> Source:
        """The folder of one component that was fetched; it has one of these configuration files."""
        source = self._find(wanted.repo_id, wanted.revision)
        folder = self._inside(source, wanted.subfolder, wanted.repo_id)
        if not any((folder / config).is_file() for config in configs):
            raise NotAPipelineError(
                f"There is no component in {wanted.subfolder or '.'!r} of {wanted.repo_id!r}: it has no configuration "
                "file.",
                hint="Name the folder of the component as `subfolder`.",
            )
        self.rules.check_weights(folder)
        return Source(folder, source.revision)

    def _find(self, repo_id: str, revision: str) -> Source:
        if (source := self._local(repo_id)) is not None:
            return source
        folder = self.hub_cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / revision
        if not folder.is_dir():
            raise RepoNotFoundError(f"{repo_id!r} is not in the daemon's cache any more.", hint="Load it again.")
        return Source(folder, revision)

    def _inside(self, source: Source, subfolder: str, repo_id: str) -> Path:
        folder = source.folder / subfolder
        # Not resolved: the Hub's cache links its files, and what links lead out of is checked elsewhere.
        if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
            raise SourceNotAllowedError(f"{subfolder!r} leads out of {repo_id!r}.", hint="Name a folder inside it.")
        return folder

    def adapter(self, wanted: AdapterSource) -> Source:
        """The file of an adapter, by itself; one of safetensors, since it may come from anybody."""
        name = wanted.weight_name
        if name and not name.endswith(".safetensors"):
            raise InvalidFieldError.of(
                "weight_name", f"{name[:100]!r} is no safetensors file.", hint="Convert the adapter to safetensors."
            )
        source = self._local(wanted.repo_id)
        if source is None:
            return self._download_adapter(wanted)
        folder = (source.folder / wanted.subfolder).resolve()
        path = (folder / (name or _likely_adapter(file.name for file in folder.glob("*.safetensors")))).resolve()
        if not path.is_relative_to(source.folder.resolve()):
            # A link in what was named, or a name that leads there by itself.
            inside = Path(wanted.subfolder, name)
            leads_out = inside.is_absolute() or ".." in inside.parts
            check = self.rules.check_named if leads_out else self.rules.check_link
            check(path, f"{wanted.repo_id}/{wanted.subfolder}/{name}")
        if not path.is_file():
            raise RepoNotFoundError(
                f"There is no adapter {name or '*.safetensors'!r} in {wanted.subfolder or '.'!r} of "
                f"{wanted.repo_id!r}.",
                hint="Check repo_id, subfolder and weight_name.",
            )
        return Source(path)

    def _download_adapter(self, wanted: AdapterSource) -> Source:
        _check_repo_id(wanted.repo_id)
        self.rules.check_repo(wanted.repo_id, wanted.revision)
        path = Downloads(Access(), lambda progress: None, lambda: None).adapter(wanted, _likely_adapter)
        return Source(path, next((part.name for part in path.parents if part.parent.name == "snapshots"), ""))

    def _local(self, repo_id: str) -> Source | None:
        if repo_id in EMBEDDED:
            return Source(EMBEDDED[repo_id])
        if not repo_id or len(repo_id) > 1024 or "\0" in repo_id:
            raise InvalidFieldError.of(
                "spec.repo_id", "is missing or longer than 1,024 characters.", hint="Name a repository or a directory."
            )
        if not repo_id.startswith(("/", "~", ".")):
            return None
        try:
            folder = Path(repo_id).expanduser().resolve()
            # Allowed or not comes first: whether a path outside exists is nobody's business.
            self.rules.check_named(folder, repo_id)
            if not folder.is_dir():
                raise RepoNotFoundError(
                    f"There is no directory {repo_id!r} on the daemon's machine.",
                    hint="Name one that is.",
                )
            for path in folder.rglob("*"):
                if path.is_symlink():
                    self.rules.check_link(path.resolve(), f"{repo_id}/{path.relative_to(folder)}")
        except DenoisedError:
            raise
        except (OSError, RuntimeError, ValueError):
            # Names that are too long, links in a circle, users that are not there.
            raise RepoNotFoundError(
                f"The directory {repo_id[:100]!r} cannot be read.", hint="Check its name and its links."
            ) from None
        return Source(folder)

    def check_connected(self, folder: Path) -> None:
        """A checkpoint's README may name further ones, which diffusers then loads: they are held to the same rules."""
        for name in _connected(folder):
            if Path(name).exists():
                self.rules.check_named(Path(name).resolve(), name)
            else:
                self.rules.check_repo(name, "")


def _connected(folder: Path) -> list[str]:
    readme = folder / "README.md"
    if not readme.is_file():
        return []
    try:
        data = ModelCard.load(readme).data
    except (OSError, ValueError, YAMLError):
        return []
    return [str(name) for key in CONNECTED_PIPES_KEYS for name in getattr(data, key, None) or []]


def _check_repo_id(repo_id: str) -> None:
    if not REPO_ID.fullmatch(repo_id):
        raise InvalidFieldError.of(
            "spec.repo_id",
            f"{repo_id[:100]!r} is neither a repository id nor an absolute directory.",
            hint='Write "owner/name", or a directory from its root.',
        )


def _likely_adapter(names: Iterable[str]) -> str:
    """The file that diffusers would load where none is named: its own name for it, or one that is no checkpoint's."""
    found = sorted(name for name in names if not any(word in name for word in ("scheduler", "optimizer", "checkpoint")))
    return next((name for name in found if name in ADAPTER_NAMES), found[0] if found else ADAPTER_NAMES[0])

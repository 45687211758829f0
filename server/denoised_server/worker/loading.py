"""From a recipe to a live pipeline, with components that are held already instead of second copies."""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from denoised.errors import DenoisedError, InvalidFieldError, NotAPipelineError, TaskNotSupportedError
from denoised_server.messages import (
    Component,
    ComponentSource,
    Derivation,
    LoadProgress,
    Override,
    Recipe,
    Spec,
)
from diffusers import AutoModel, DiffusionPipeline
from diffusers.pipelines import auto_pipeline, pipeline_utils
from torch import nn

from . import components, weights
from .components import ComponentStore
from .construction import Construction
from .engine import Cancelled
from .ledger import Ledger, Plan
from .sources import Sources
from .weights import Digests, WeightFile

logger = logging.getLogger(__name__)

AUTO_CLASSES = {
    "text-to-image": diffusers.AutoPipelineForText2Image,
    "image-to-image": diffusers.AutoPipelineForImage2Image,
    "inpainting": diffusers.AutoPipelineForInpainting,
}
MAPPINGS = {
    "text-to-image": auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    "image-to-image": auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    "inpainting": auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
}
# What diffusers' Auto classes take beside the names in a pipeline's constructor.
AUTO_OPTIONS = frozenset({"controlnet", "enable_pag", "pag_applied_layers"})
# Newer diffusers warns about the old name.
DTYPE = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"
PATH = re.compile(r"(?:/[\w.@+-]+){2,}/?")


@dataclass(slots=True)
class Live:
    """A pipeline in memory. Requests run on views of it and never change it."""

    pipeline: DiffusionPipeline
    task: str
    components: tuple[Component, ...]
    revision: str = ""


@dataclass(frozen=True, slots=True)
class _Part:
    """A component that a load needs: what identifies it, and which files it comes from."""

    role: str
    digest: str
    files: tuple[WeightFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.memory_bytes for file in self.files)


class Loader:
    """Builds pipelines. One load at a time; deriving may go on beside it."""

    def __init__(
        self, store: ComponentStore, ledger: Ledger, sources: Sources, construction: Construction, device: torch.device
    ) -> None:
        self._store, self._ledger, self._sources = store, ledger, sources
        self._construction, self._device = construction, device
        self._digests = Digests()

    def load(
        self,
        user: str,
        recipe: Recipe,
        progress: Callable[[LoadProgress], None],
        check_cancelled: Callable[[], None],
    ) -> Live:
        """Builds the recipe's pipeline for the handle `user`. A failed or cancelled load leaves nothing behind.

        Raises what `denoised.errors` has for loads, and what `check_cancelled` raises.
        """
        progress(LoadProgress("looking up", "", 0, 0))
        try:
            live = self._load_spec(user, recipe.spec, progress, check_cancelled)
            for derivation in recipe.derivations:
                live = self.derive(user, live, derivation)
            return live
        except BaseException:
            self.release(user)
            raise

    def derive(self, user: str, source: Live, derivation: Derivation | None) -> Live:
        """A pipeline for another task from a live one's components, as `from_pipe` makes it; a twin without one."""
        if derivation is None:
            pipeline, task = source.pipeline, source.task
        else:
            pipeline, task = self._from_pipe(source.pipeline, derivation), derivation.task
        self._store.share(_modules(pipeline).values(), user)
        return Live(pipeline, task, self._describe(pipeline), source.revision)

    def release(self, user: str) -> int:
        """Lets go of what only this handle uses; returns the bytes."""
        return sum(self._ledger.release(digest) for digest in self._store.release(user))

    def _load_spec(
        self,
        user: str,
        spec: Spec,
        progress: Callable[[LoadProgress], None],
        check_cancelled: Callable[[], None],
    ) -> Live:
        source = self._sources.pipeline(
            spec.repo_id, revision=spec.revision, variant=spec.variant, use_safetensors=spec.use_safetensors
        )
        index = _read_index(source.folder)
        loader = _pipeline_class(spec.task)
        dtype = _dtype(spec.dtype)
        _check_overrides(spec.overrides, index["_class_name"], index)

        parts = self._parts(source.folder, index, spec, dtype)
        plan = self._ledger.plan({part.digest: part.bytes for part in parts})
        reservation = self._ledger.reserve(plan)
        settled: dict[str, int] = {}
        try:
            ready: dict[str, Any] = {}
            for name, override in spec.overrides.items():
                if isinstance(override, ComponentSource):
                    ready[name] = self._load_component(user, override, dtype, settled)
                else:
                    ready[name] = override
            for part in parts:
                module = self._store.acquire(part.digest, user)
                if module is not None:
                    ready[part.role] = module
            report = _Report(parts, plan, progress, check_cancelled)
            with self._construction.loading(), report:
                pipeline = loader.from_pretrained(
                    source.folder,
                    **{DTYPE: dtype},
                    variant=spec.variant or None,
                    use_safetensors=spec.use_safetensors,
                    local_files_only=True,
                    **ready,
                )
            check_cancelled()
            progress(LoadProgress("moving to device", "", report.total_bytes, report.total_bytes))
            for module in _modules(pipeline).values():
                if self._store.find(module) is None:
                    self._to_device(module)
            self._hold(user, pipeline, parts, settled)
        except DenoisedError:
            raise
        except Cancelled:
            raise
        except Exception as error:
            raise _load_error(spec, index, error) from None
        finally:
            self._ledger.settle(reservation, settled)
        return Live(pipeline, spec.task or _task_of(pipeline), self._describe(pipeline), source.revision)

    def _parts(self, folder: Path, index: Mapping[str, Any], spec: Spec, dtype: torch.dtype) -> list[_Part]:
        parts = []
        for role, entry in index.items():
            if role in spec.overrides or not isinstance(entry, list) or entry[1] is None:
                continue
            found = self._weight_files(folder / role, spec.variant, spec.use_safetensors, dtype)
            if found:
                parts.append(_Part(role, self._digest(folder / role, found, entry[1], dtype), tuple(found)))
        return parts

    def _weight_files(
        self, folder: Path, variant: str, use_safetensors: bool | None, dtype: torch.dtype
    ) -> list[WeightFile]:
        return weights.find(folder, variant=variant, use_safetensors=use_safetensors, item_bytes=dtype.itemsize)

    def _digest(self, folder: Path, files: list[WeightFile], class_name: str, dtype: torch.dtype) -> str:
        paths = [file.path for file in files]
        return self._digests.of_component(
            paths, config=folder / "config.json", class_name=class_name, dtype=str(dtype).removeprefix("torch.")
        )

    def _load_component(
        self, user: str, override: ComponentSource, dtype: torch.dtype, settled: dict[str, int]
    ) -> nn.Module:
        """A component from elsewhere, shared if its content is held."""
        source = self._sources.component(
            override.repo_id, subfolder=override.subfolder, revision=override.revision, variant=override.variant
        )
        config = json.loads((source.folder / "config.json").read_text())
        class_name = config.get("_class_name") or next(iter(config.get("architectures") or ["?"]))
        files = self._weight_files(source.folder, override.variant, None, dtype)
        digest = self._digest(source.folder, files, class_name, dtype)
        if (held := self._store.acquire(digest, user)) is not None:
            return held
        reservation = self._ledger.reserve(self._ledger.plan({digest: sum(file.memory_bytes for file in files)}))
        try:
            with self._construction.loading():
                module: nn.Module = AutoModel.from_pretrained(
                    source.folder, **{DTYPE: dtype}, variant=override.variant or None, local_files_only=True
                )
            self._to_device(module)
            settled[digest] = self._store.add(digest, module, user).weight_bytes
            return module
        finally:
            self._ledger.cancel(reservation)

    def _to_device(self, module: nn.Module) -> None:
        if self._device.type == "cpu":
            # safetensors maps the file: weights would change with it, or take the process down when it is truncated.
            module._apply(torch.clone)
        else:
            module.to(self._device)

    def _hold(self, user: str, pipeline: DiffusionPipeline, parts: list[_Part], settled: dict[str, int]) -> None:
        """Enters the pipeline's components into the store, under their content where files identify it."""
        digests = {part.role: part.digest for part in parts}
        for role, module in _modules(pipeline).items():
            if (held := self._store.find(module)) is None:
                digest = digests.get(role, "")
                if not digest or digest in settled:  # the same content twice in one checkpoint: two modules
                    digest = f"object:{id(module):x}"
                held = self._store.add(digest, module, user)
                settled[digest] = held.weight_bytes
            self._store.acquire(held.digest, user)

    def _describe(self, pipeline: DiffusionPipeline) -> tuple[Component, ...]:
        described = []
        for role, part in pipeline.components.items():
            if part is None:
                continue
            held = self._store.find(part) if isinstance(part, nn.Module) else None
            if held is None:
                described.append(Component(role, type(part).__name__))
            else:
                described.append(
                    Component(
                        role,
                        type(part).__name__,
                        held.digest,
                        held.weight_bytes,
                        components.dtype_name(held.module),
                    )
                )
        return tuple(described)

    def _from_pipe(self, pipeline: DiffusionPipeline, derivation: Derivation) -> DiffusionPipeline:
        if derivation.task not in AUTO_CLASSES:
            raise _unknown_task(derivation.task)
        for name, override in derivation.overrides.items():
            if isinstance(override, ComponentSource):
                raise InvalidFieldError.of(
                    f"derivation.overrides[{name}]",
                    "a derived pipeline cannot bring weights of its own yet.",
                    hint="Name the component when loading instead.",
                )
        try:
            _check_overrides(derivation.overrides, type(pipeline).__name__, pipeline.config)
            return AUTO_CLASSES[derivation.task].from_pipe(pipeline, **derivation.overrides)
        except ValueError as error:
            if isinstance(error, DenoisedError):
                raise
            raise TaskNotSupportedError(
                f"A {type(pipeline).__name__} cannot be made into a pipeline for {derivation.task}: "
                f"{_clean(str(error))}",
                hint=_supported(type(pipeline).__name__),
            ) from None


class _Report:
    """Tells how far a load is, by watching diffusers go from component to component; stops it when cancelled."""

    def __init__(
        self,
        parts: list[_Part],
        plan: Plan,
        progress: Callable[[LoadProgress], None],
        check_cancelled: Callable[[], None],
    ) -> None:
        self._bytes = {part.role: part.bytes for part in parts}
        self._progress, self._check_cancelled = progress, check_cancelled
        self.total_bytes, self._done = plan.new_bytes + plan.shared_bytes, plan.shared_bytes
        self._original = getattr(pipeline_utils, "load_sub_model", None)

    def __enter__(self) -> None:
        if self._original is None:
            return
        original = self._original

        def load_sub_model(*args: Any, name: str = "", **kwargs: Any) -> Any:
            self._check_cancelled()
            self._progress(LoadProgress("reading weights", name, self._done, self.total_bytes))
            loaded = original(*args, name=name, **kwargs)
            self._done += self._bytes.get(name, 0)
            return loaded

        pipeline_utils.load_sub_model = load_sub_model

    def __exit__(self, *_: object) -> None:
        if self._original is not None:
            pipeline_utils.load_sub_model = self._original
        self._progress(LoadProgress("reading weights", "", self._done, self.total_bytes))


def _modules(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    return {role: part for role, part in pipeline.components.items() if isinstance(part, nn.Module)}


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / "model_index.json").read_text())
        if not isinstance(index.get("_class_name"), str):
            raise TypeError
    except (OSError, ValueError, TypeError, AttributeError):
        raise NotAPipelineError(
            "The checkpoint's model_index.json cannot be read, or names no pipeline class.",
            hint="Download or save the checkpoint again.",
        ) from None
    return dict(index)


def _pipeline_class(task: str) -> Any:
    """The class whose `from_pretrained` to call: diffusers' own Auto class for the task."""
    if not task:
        return DiffusionPipeline
    if task not in AUTO_CLASSES:
        raise _unknown_task(task)
    return AUTO_CLASSES[task]


def _unknown_task(task: str) -> InvalidFieldError:
    return InvalidFieldError.of("task", f"{task!r} is not known.", hint=f"Use one of {', '.join(AUTO_CLASSES)}.")


def _task_of(pipeline: DiffusionPipeline) -> str:
    name = type(pipeline)
    return next((task for task, mapping in MAPPINGS.items() if name in mapping.values()), "")


def _supported(class_name: str) -> str:
    tasks = [
        task
        for task, mapping in MAPPINGS.items()
        if auto_pipeline._get_task_class(mapping, class_name, throw_error_if_not_exist=False) is not None
    ]
    return f"diffusers maps {class_name} to {', '.join(tasks) or 'no task'}."


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidFieldError.of(
            "spec.dtype", f"weights cannot be held as {name!r}.", hint="Use float32, float16 or bfloat16."
        )
    return dtype


def _check_overrides(overrides: Mapping[str, Override], class_name: str, index: Mapping[str, Any]) -> None:
    """diffusers only warns about names that it does not know, or ignores them."""
    known = {name for name in index if not name.startswith("_")} | AUTO_OPTIONS
    pipeline_class = getattr(diffusers, class_name, None)
    if pipeline_class is not None:
        modules, options = pipeline_class._get_signature_keys(pipeline_class)
        known |= {*modules, *options}
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise InvalidFieldError.of(
                f"spec.overrides[{name}]",
                f"{class_name} has no component or option of this name.",
                hint=f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(sorted(known))}.",
            )


def _load_error(spec: Spec, index: Mapping[str, Any], error: Exception) -> DenoisedError:
    """What diffusers raised while loading, as one of ours."""
    logger.debug("loading %s failed", spec.repo_id, exc_info=error)
    text = _clean(str(error))
    if isinstance(error, ValueError) and "AutoPipeline can't find" in str(error):
        class_name = str(index["_class_name"])
        return TaskNotSupportedError(
            f"{spec.repo_id!r} is a {class_name}, which diffusers does not map to {spec.task}.",
            hint=_supported(class_name),
        )
    return NotAPipelineError(
        f"diffusers cannot load {spec.repo_id!r}: {text}",
        hint="Check that the checkpoint is complete and that the daemon's diffusers is recent enough for it.",
    )


def _clean(text: str) -> str:
    """The first lines of a library's message, without the daemon's paths."""
    return PATH.sub("…", " ".join(text.split()))[:400]

"""What a spec names: its parts, nothing of them loaded yet, and how a pipeline is made of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from denoised.errors import DenoisedError, NotAPipelineError, TaskNotSupportedError
from denoised_server.messages import Spec
from diffusers import DiffusionPipeline

from . import families, fit, overrides, parts
from .construction import Construction
from .digests import Digests
from .dtypes import Dtypes
from .overrides import Weightless
from .parts import DIFFUSERS_DTYPE, Part
from .quantization import Quantization
from .quotation import quote
from .single_file import SingleFile
from .sources import Sources

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A spec that was looked into.

    `own` are the parts that the pipeline's own loading reads, `brought` those that it is given: overrides, and all of
    a single file. `make` is given what is loaded already, by role, and returns the pipeline.
    """

    spec: Spec
    class_name: str
    dtypes: Dtypes
    own: list[Part]
    brought: list[Part | Weightless]
    make: Callable[[Mapping[str, Any]], DiffusionPipeline]

    @property
    def parts(self) -> list[Part]:
        """All that have weights."""
        return [*self.own, *(part for part in self.brought if isinstance(part, Part))]


def find(
    spec: Spec,
    sources: Sources,
    digests: Digests,
    construction: Construction,
    *,
    learn: Callable[[Iterable[Path]], None] = lambda _: None,
) -> Checkpoint:
    """Looks into what was fetched or is on this machine anyway. Raises what `denoised.errors` has for loads.

    `learn` is told of weight files before they are identified one by one.
    """
    loader, dtypes = families.auto_class(spec.task), Dtypes.of_spec(spec)
    spec = replace(spec, use_safetensors=sources.rules.use_safetensors(spec.use_safetensors))
    source = sources.pipeline(spec)

    index = _read_index(source.folder)
    class_name = str(index["_class_name"])
    sources.rules.check_checkpoint(
        source.folder, {role: entry for role, entry in index.items() if role not in spec.overrides}
    )
    sources.check_connected(source.folder)
    families.check_overrides(spec.overrides, class_name, index, spec.task)
    pipeline_class = getattr(diffusers, class_name, None)

    def from_pretrained(given: Mapping[str, Any]) -> DiffusionPipeline:
        # For parts without files to tell by, diffusers' own default.
        by_role = {"default": dtypes.default or torch.float32, **dtypes.by_role}
        pipeline: DiffusionPipeline = loader.from_pretrained(
            str(source.folder),
            **{DIFFUSERS_DTYPE: by_role | {part.role: part.dtype for part in own}},
            variant=spec.variant or None,
            use_safetensors=spec.use_safetensors,
            local_files_only=True,
            **quantization,
            **given,
        )
        return pipeline

    def make(ready: Mapping[str, Any]) -> DiffusionPipeline:
        shared = {part.role: ready[part.role] for part in (*own, *single) if part.role in ready}
        pipeline = read({**shared, **overrides.arguments(spec.overrides, ready)})
        fit.check(pipeline, spec.task)
        return pipeline

    try:
        own: list[Part] = []
        single: list[Part] = []
        quantization: Mapping[str, Any] = {}
        read: Callable[[Mapping[str, Any]], DiffusionPipeline] = from_pretrained
        if spec.single_file:
            file = SingleFile.of_spec(sources.single_file(spec), source.folder, class_name, spec)
            learn([file.path])
            single = file.parts(index, spec, dtypes, digests, construction)
            read = file.make
        else:
            learn(parts.files_of(source.folder, index, spec))
            own = parts.of_checkpoint(source.folder, index, spec, dtypes, digests)
            quantized = Quantization.of_parts(spec.quantization_config, own)
            own, quantization = quantized.identify(own), quantized.arguments(own)
        foreign = overrides.find(spec.overrides, pipeline_class, dtypes, sources, digests)
        dtypes.check_roles([*index, *(part.role for part in foreign)])
    except DenoisedError:
        raise
    except Exception as error:
        raise load_error(spec, class_name, error) from None
    return Checkpoint(spec, class_name, dtypes, own, [*single, *foreign], make)


def load_error(spec: Spec, class_name: str, error: Exception) -> DenoisedError:
    """What diffusers raised while loading, as one of ours."""
    logger.debug("loading %s failed", spec.repo_id, exc_info=error)
    if isinstance(error, ValueError) and "AutoPipeline can't find" in str(error):
        return TaskNotSupportedError(
            f"{spec.repo_id!r} is a {class_name}, which diffusers does not map to {spec.task}.",
            hint=families.supported(class_name),
        )
    return NotAPipelineError(
        f"diffusers cannot load {spec.repo_id!r}: {quote(error)}.",
        hint="Check that the checkpoint is complete and that the daemon's diffusers is recent enough for it.",
    )


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

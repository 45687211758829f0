"""Pipelines whose weights are in one file, in the layout of those who trained them, read as diffusers reads them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from denoised.errors import InvalidFieldError, NotAPipelineError, TaskNotSupportedError
from denoised_server.messages import Spec
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders import FromOriginalModelMixin
from diffusers.loaders.single_file import SINGLE_FILE_OPTIONAL_COMPONENTS
from diffusers.loaders.single_file_utils import is_clip_model_in_single_file, is_t5_in_single_file
from diffusers.pipelines import auto_pipeline
from torch import nn

from . import classes, families, parts, weights
from .construction import Construction
from .digests import Digests
from .dtypes import Dtypes
from .parts import DIFFUSERS_DTYPE, Part


@dataclass(frozen=True, slots=True)
class SingleFile:
    """A file, the folder that describes what is in it, and the class to load it as."""

    path: Path
    config: Path
    pipeline_class: Any

    @classmethod
    def of_spec(cls, path: Path, config: Path, class_name: str, spec: Spec) -> SingleFile:
        """Raises InvalidFieldError for what selects another class, and TaskNotSupportedError."""
        for name in families.AUTO_OPTIONS & spec.overrides.keys():
            raise InvalidFieldError.of(
                f"spec.overrides[{name}]",
                "a single file is loaded as the class that its configuration names.",
                hint=f"Load it without {name}, and give that to `from_pipe`.",
            )
        found = getattr(diffusers, class_name, None)
        if spec.task:
            mapping = families.MAPPINGS[spec.task]
            found = auto_pipeline._get_task_class(mapping, class_name, throw_error_if_not_exist=False)
        if found is None:
            raise TaskNotSupportedError(
                f"The configuration is of a {class_name}, which diffusers does not map to {spec.task or 'a class'}.",
                hint=families.supported(class_name),
            )
        if not (issubclass(found, DiffusionPipeline) and hasattr(found, "from_single_file")):
            raise TaskNotSupportedError(
                f"diffusers reads no single files as {found.__name__}.", hint="Load a checkpoint in diffusers' layout."
            )
        return cls(path, config, found)

    def parts(
        self, index: Mapping[str, Any], spec: Spec, dtypes: Dtypes, digests: Digests, construction: Construction
    ) -> tuple[list[Part], list[Part]]:
        """Components with weights: those in the file, and those beside its configuration, which it lacks.

        Raises DamagedWeightsError, and NotAPipelineError for one that is in neither place.
        """
        header, dtype = weights.header(self.path), self._dtype(dtypes)
        modules, _ = self.pipeline_class._get_signature_keys(self.pipeline_class)
        inside, beside = [], []
        for role, entry in index.items():
            # diffusers leaves optional ones out, unless they are given.
            if role not in modules or role in spec.overrides or role in SINGLE_FILE_OPTIONAL_COMPONENTS:
                continue
            if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
                continue
            component_class = classes.find(entry[1], f"config_source[{role}]")
            if not classes.has_weights(component_class):
                continue
            folder = self.config / role
            if _is_inside(component_class, header):
                digest = digests.of_component(
                    [self.path],
                    config=folder / "config.json",
                    class_name=entry[1],
                    dtype=str(dtype).removeprefix("torch."),
                    role=role,
                )
                size = _memory_bytes(component_class, folder, dtype, construction)
                inside.append(Part(role, digest, size, folder, entry[1], "", True, dtype, (self.path,)))
                continue
            part = parts.of_folder(role, folder, entry[1], spec.variant, spec.use_safetensors, dtypes.of(role), digests)
            if part is None:
                raise NotAPipelineError(
                    f"The weights of {role} are neither in {self.path.name!r} nor with its configuration.",
                    hint=f"Give them, such as {role}=denoised.{entry[1]}.from_pretrained(…).",
                )
            beside.append(part)
        return inside, beside

    def make(self, dtypes: Dtypes, given: Mapping[str, Any]) -> DiffusionPipeline:
        """The pipeline, with the components and options that are given."""
        pipeline: DiffusionPipeline = self.pipeline_class.from_single_file(
            str(self.path),
            config=str(self.config),
            local_files_only=True,
            **{DIFFUSERS_DTYPE: self._dtype(dtypes)},
            **given,
        )
        return pipeline

    def _dtype(self, dtypes: Dtypes) -> torch.dtype:
        """One for all that is in the file: without one asked for, its own."""
        found: torch.dtype = dtypes.default or getattr(torch, weights.dtype_of([self.path]))
        return found


def _is_inside(component_class: Any, header: Mapping[str, Any]) -> bool:
    """As diffusers decides it: by names of tensors for text encoders, and always for its own classes that can."""
    if issubclass(component_class, FromOriginalModelMixin):
        return True
    if issubclass(component_class, ModelMixin):
        return False
    return bool(is_clip_model_in_single_file(component_class, header) or is_t5_in_single_file(header))


def _memory_bytes(component_class: Any, folder: Path, dtype: torch.dtype, construction: Construction) -> int:
    """What a component takes in memory: the file has tensors under other names, and more than the component keeps."""
    if issubclass(component_class, ModelMixin):
        config = component_class.load_config(str(folder), local_files_only=True)
    else:
        config = component_class.config_class.from_pretrained(str(folder), local_files_only=True)
    # It patches modules for the whole process, as loading does.
    with construction.turn(), init_empty_weights():
        if issubclass(component_class, ModelMixin):
            empty: nn.Module = component_class.from_config(config)
        else:
            empty = component_class(config)
    tensors = itertools.chain(empty.parameters(), empty.buffers())
    return sum(tensor.numel() * (dtype if tensor.is_floating_point() else tensor.dtype).itemsize for tensor in tensors)

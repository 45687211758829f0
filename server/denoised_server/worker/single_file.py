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
from diffusers.loaders import FromOriginalModelMixin, single_file, single_file_model, single_file_utils
from diffusers.pipelines import auto_pipeline
from torch import nn

from . import classes, families, parts, weights
from .construction import Construction
from .digests import Digests
from .dtypes import Dtypes
from .parts import Part


@dataclass(frozen=True, slots=True)
class PartInFile(Part):
    """A component whose weights are in the file; `folder` has its configuration, `library` the module of its class."""

    library: str

    def load(self) -> nn.Module:
        is_of_pipelines = hasattr(diffusers.pipelines, self.library)
        (file,) = self.files
        module: nn.Module = single_file.load_single_file_sub_model(
            library_name=self.library,
            class_name=self.class_name,
            name=self.role,
            # Read for each: some conversions take out of it what others would look for. It is mapped, not copied.
            checkpoint=single_file_utils.load_single_file_checkpoint(str(file), local_files_only=True),
            pipelines=diffusers.pipelines,
            is_pipeline_module=is_of_pipelines,
            cached_model_config_path=str(self.folder.parent),
            local_files_only=True,
            torch_dtype=self.dtype,
        )
        return module.eval()


@dataclass(frozen=True, slots=True)
class SingleFile:
    """A file, the folder that describes what is in it, and the class to load it as."""

    path: Path
    config: Path
    pipeline_class: Any
    task: str

    @classmethod
    def of_spec(cls, path: Path, config: Path, class_name: str, spec: Spec) -> SingleFile:
        """Raises TaskNotSupportedError, and InvalidFieldError for what selects another class of no task."""
        for name in families.AUTO_OPTIONS & spec.overrides.keys():
            if not spec.task:
                raise InvalidFieldError.of(
                    f"spec.overrides[{name}]",
                    "without a task, a single file is loaded as the class that its configuration names.",
                    hint="Say the task.",
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
        return cls(path, config, found, spec.task)

    def parts(
        self, index: Mapping[str, Any], spec: Spec, dtypes: Dtypes, digests: Digests, construction: Construction
    ) -> list[Part]:
        """Components with weights: those in the file, and those beside its configuration, which it lacks.

        Raises DamagedWeightsError, and NotAPipelineError for one that is in neither place.
        """
        header, own = weights.header(self.path), getattr(torch, weights.dtype_of([self.path]))
        modules, _ = self.pipeline_class._get_signature_keys(self.pipeline_class)
        found: list[Part] = []
        for role, entry in index.items():
            # diffusers leaves optional ones out, unless they are given.
            if role not in modules or role in spec.overrides or role in single_file.SINGLE_FILE_OPTIONAL_COMPONENTS:
                continue
            if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(each, str) for each in entry):
                continue
            component_class = classes.find(entry[1], f"config_source[{role}]")
            if not classes.has_weights(component_class):
                continue
            folder = self.config / role
            outline = _outline(component_class, folder, construction)
            if _is_inside(component_class, outline, header):
                dtype = dtypes.of(role) or own
                digest = digests.of_component(
                    [self.path],
                    config=folder / "config.json",
                    class_name=entry[1],
                    dtype=str(dtype).removeprefix("torch."),
                    role=role,
                )
                size = _memory_bytes(outline, dtype)
                found.append(PartInFile(role, digest, size, folder, entry[1], "", True, dtype, (self.path,), entry[0]))
                continue
            part = parts.of_folder(role, folder, entry[1], spec.variant, spec.use_safetensors, dtypes.of(role), digests)
            if part is None:
                raise NotAPipelineError(
                    f"The weights of {role} are neither in {self.path.name!r} nor with its configuration.",
                    hint=f"Give them, such as {role}=denoised.{entry[1]}.from_pretrained(…).",
                )
            found.append(part)
        if not any(isinstance(part, PartInFile) for part in found):
            raise NotAPipelineError(
                f"Nothing of a {self.pipeline_class.__name__} was found in {self.path.name!r}.",
                hint="Check that config describes what is in the file.",
            )
        return found

    def make(self, given: Mapping[str, Any]) -> DiffusionPipeline:
        """The pipeline, of the components with weights and the options that are given."""
        modules, options = self.pipeline_class._get_signature_keys(self.pipeline_class)
        direct = {name: value for name, value in given.items() if name in {*modules, *options}}
        pipeline: DiffusionPipeline = self.pipeline_class.from_single_file(
            str(self.path), config=str(self.config), local_files_only=True, **direct
        )
        # What selects another class, diffusers' Auto classes know.
        if selecting := {name: value for name, value in given.items() if name not in direct}:
            pipeline = families.auto_class(self.task).from_pipe(pipeline, **selecting)
        return pipeline


def _outline(component_class: Any, folder: Path, construction: Construction) -> nn.Module:
    """The component without its weights."""
    if issubclass(component_class, ModelMixin):
        config = component_class.load_config(str(folder), local_files_only=True)
    else:
        config = component_class.config_class.from_pretrained(str(folder), local_files_only=True)
    # It patches modules for the whole process, as loading does.
    with construction.turn(), init_empty_weights():
        made: nn.Module = (
            component_class.from_config(config) if issubclass(component_class, ModelMixin) else component_class(config)
        )
    return made


def _is_inside(component_class: Any, outline: nn.Module, header: Mapping[str, Any]) -> bool:
    """As diffusers decides it: by names of tensors for text encoders, by what its conversion finds for its own."""
    if issubclass(component_class, FromOriginalModelMixin):
        return _finds_something(component_class, outline, header)
    if issubclass(component_class, ModelMixin):
        return False
    return bool(
        single_file_utils.is_clip_model_in_single_file(component_class, header)
        or single_file_utils.is_t5_in_single_file(header)
    )


def _finds_something(component_class: Any, outline: Any, header: Mapping[str, Any]) -> bool:
    wanted = outline.state_dict().keys()
    if wanted <= header.keys():
        return True
    mapped = single_file_model._get_single_file_loadable_mapping_class(component_class)
    if mapped is None:
        return False
    convert = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[mapped]["checkpoint_mapping_fn"]
    stand_ins = {name: torch.empty(tensor["shape"], device="meta") for name, tensor in header.items()}
    try:
        found = convert(checkpoint=stand_ins, config=dict(outline.config))
    except Exception:
        # Of another layout, perhaps: loading says what is wrong with it.
        return True
    return not wanted.isdisjoint(found)


def _memory_bytes(outline: nn.Module, dtype: torch.dtype) -> int:
    """What a component takes in memory: the file has tensors under other names, and more than the component keeps."""
    tensors = itertools.chain(outline.parameters(), outline.buffers())
    return sum(tensor.numel() * (dtype if tensor.is_floating_point() else tensor.dtype).itemsize for tensor in tensors)

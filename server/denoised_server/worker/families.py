"""What diffusers maps to what: tasks, pipeline classes, and what their constructors take."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import diffusers
from denoised.errors import InvalidFieldError
from diffusers import DiffusionPipeline
from diffusers.pipelines import auto_pipeline

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


def auto_class(task: str) -> Any:
    """The class to load or derive with; without a task, the checkpoint's own. Raises InvalidFieldError."""
    if not task:
        return DiffusionPipeline
    if task not in AUTO_CLASSES:
        raise InvalidFieldError.of("task", f"{task!r} is not known.", hint=f"Use one of {', '.join(AUTO_CLASSES)}.")
    return AUTO_CLASSES[task]


def task_of(pipeline: DiffusionPipeline) -> str:
    """Empty for a class that no task of ours covers."""
    return next((task for task, mapping in MAPPINGS.items() if type(pipeline) in mapping.values()), "")


def supported(class_name: str) -> str:
    """A sentence on the tasks that a class can be had for."""
    tasks = [
        task
        for task, mapping in MAPPINGS.items()
        if auto_pipeline._get_task_class(mapping, class_name, throw_error_if_not_exist=False) is not None
    ]
    return f"diffusers maps {class_name} to {', '.join(tasks) or 'no task'}."


def check_overrides(names: Iterable[str], class_name: str, config: Iterable[str]) -> None:
    """diffusers only warns about names that it does not know, or ignores them. Raises InvalidFieldError."""
    known = {name for name in config if not name.startswith("_")} | AUTO_OPTIONS
    pipeline_class = getattr(diffusers, class_name, None)
    if pipeline_class is not None:
        modules, options = pipeline_class._get_signature_keys(pipeline_class)
        known |= {*modules, *options}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise InvalidFieldError.of(
                f"spec.overrides[{name}]",
                f"{class_name} has no component or option of this name.",
                hint=f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(sorted(known))}.",
            )

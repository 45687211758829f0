"""What diffusers maps to what: tasks, pipeline classes, and what their constructors take."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import diffusers
from denoised.errors import InvalidFieldError
from diffusers import DiffusionPipeline
from diffusers.pipelines import auto_pipeline

# By diffusers' own names; what an older diffusers does not have yet is left out.
MAPPINGS: dict[str, dict[str, Any]] = {
    task: mapping
    for task, name in (
        ("text-to-image", "TEXT2IMAGE"),
        ("image-to-image", "IMAGE2IMAGE"),
        ("inpainting", "INPAINT"),
        ("text-to-audio", "TEXT2AUDIO"),
        ("text-to-video", "TEXT2VIDEO"),
        ("image-to-video", "IMAGE2VIDEO"),
        ("video-to-video", "VIDEO2VIDEO"),
    )
    if (mapping := getattr(auto_pipeline, f"AUTO_{name}_PIPELINES_MAPPING", None))
}


class MappedPipeline:
    """What diffusers' Auto classes do, for mappings that have none."""

    def __init__(self, mapping: dict[str, Any]) -> None:
        self._mapping = mapping

    def from_pretrained(self, folder: str, **options: Any) -> DiffusionPipeline:
        class_name = DiffusionPipeline.load_config(folder)["_class_name"]
        return auto_pipeline._get_task_class(self._mapping, class_name).from_pretrained(folder, **options)

    def from_pipe(self, pipeline: DiffusionPipeline, **overrides: Any) -> DiffusionPipeline:
        pipeline_class = auto_pipeline._get_task_class(self._mapping, type(pipeline).__name__)
        modules, options = pipeline_class._get_signature_keys(pipeline_class)
        had = {name: part for name, part in pipeline.components.items() if name in modules}
        set_before = {name: value for name, value in pipeline.config.items() if name in options}
        given = had | set_before | overrides
        if missing := set(modules) - set(pipeline_class._optional_components) - given.keys():
            raise ValueError(f"{pipeline_class.__name__} needs {', '.join(sorted(missing))}")
        return pipeline_class(**given)


def _auto_class(task: str) -> Any:
    public = {
        "text-to-image": "AutoPipelineForText2Image",
        "image-to-image": "AutoPipelineForImage2Image",
        "inpainting": "AutoPipelineForInpainting",
        "text-to-audio": "AutoPipelineForText2Audio",
    }
    return getattr(diffusers, public[task]) if task in public else MappedPipeline(MAPPINGS[task])


AUTO_CLASSES: dict[str, Any] = {task: _auto_class(task) for task in MAPPINGS}
# What diffusers' Auto classes take beside the names in a pipeline's constructor.
AUTO_OPTIONS = frozenset({"controlnet", "enable_pag", "pag_applied_layers"})


def auto_class(task: str) -> Any:
    """The class to load or derive with; without a task, the checkpoint's own. Raises InvalidFieldError."""
    if not task:
        return DiffusionPipeline
    if task not in AUTO_CLASSES:
        raise InvalidFieldError.of("task", f"{task!r} is not known.", hint=f"Use one of {', '.join(AUTO_CLASSES)}.")
    return AUTO_CLASSES[task]


def loads_connected(class_name: str, task: str) -> bool:
    """Whether a checkpoint of this class is loaded with further ones, which its README names."""
    own = getattr(diffusers, class_name, None)
    found = auto_pipeline._get_task_class(MAPPINGS[task], class_name, throw_error_if_not_exist=False) if task else own
    return bool(getattr(found, "_load_connected_pipes", False))


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


def check_overrides(names: Iterable[str], class_name: str, config: Iterable[str], task: str) -> None:
    """diffusers only warns about names that it does not know, or ignores them. Raises InvalidFieldError."""
    known = {name for name in config if not name.startswith("_")} | AUTO_OPTIONS
    # What the task's class takes counts: a refiner's score is an option of image-to-image only.
    meant = auto_pipeline._get_task_class(MAPPINGS.get(task, {}), class_name, throw_error_if_not_exist=False)
    for pipeline_class in filter(None, (getattr(diffusers, class_name, None), meant)):
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

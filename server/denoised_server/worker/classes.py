"""Classes of diffusers and transformers: by name, and what kind of component each is."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

import diffusers
import transformers
from denoised.errors import InvalidFieldError
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from transformers import PreTrainedModel

LIBRARIES = (diffusers, transformers)
SCHEDULER = "noise scheduler"


def find(name: str, field: str) -> Any:
    """The component class of this name. Raises InvalidFieldError for what is none."""
    found = next((vars_of[name] for vars_of in map(_Lookup, LIBRARIES) if name in vars_of), None)
    found = found or _of_pipelines(name)
    if not inspect.isclass(found) or issubclass(found, DiffusionPipeline) or not hasattr(found, "from_pretrained"):
        near = difflib.get_close_matches(name, [*dir(diffusers), *dir(transformers)], 1)
        raise InvalidFieldError.of(
            field,
            f"neither diffusers nor transformers has a component class {name[:80]!r}.",
            hint=f"Did you mean {near[0]!r}?" if near else "Name a class such as AutoencoderKL or ControlNetModel.",
        )
    return found


def has_weights(kind: Any) -> bool:
    """Whether its objects are modules; noise schedulers, tokenizers and image processors are not."""
    return issubclass(kind, ModelMixin | PreTrainedModel)


def kind_of(component_class: Any) -> str:
    """What it is for, in words: classes of one kind stand in for each other."""
    if issubclass(component_class, SchedulerMixin):
        return SCHEDULER
    if issubclass(component_class, ModelMixin):
        # "diffusers.models.controlnets.controlnet" is among controlnets.
        parts = component_class.__module__.split(".")
        return parts[2].removesuffix("s") if parts[:2] == ["diffusers", "models"] and len(parts) > 3 else "model"
    return "transformers model" if issubclass(component_class, PreTrainedModel) else "tokenizer or processor"


def kinds_of_role(pipeline_class: Any, role: str) -> frozenset[str]:
    """Kinds that a pipeline's constructor takes in a role; empty where its annotation does not say."""
    if role == "scheduler":
        return frozenset({SCHEDULER})
    if role == "controlnet":
        # The checkpoint's own class, which is looked at, takes none where naming it selects another one.
        return frozenset({"controlnet"})
    annotation = _annotations(pipeline_class).get(role)
    members = [member for member in _members(annotation) if member is not type(None)]
    if not members or not all(map(_is_component, members)) or not {ModelMixin, PreTrainedModel}.isdisjoint(members):
        return frozenset()
    return frozenset(map(kind_of, members))


class _Lookup:
    """Names of a library, whose lazy modules raise for those that need packages which are not there."""

    def __init__(self, library: types.ModuleType) -> None:
        self._library = library

    def __contains__(self, name: str) -> bool:
        return name.isidentifier() and not name.startswith("_") and hasattr(self._library, name)

    def __getitem__(self, name: str) -> Any:
        return getattr(self._library, name)


def _of_pipelines(name: str) -> Any:
    """Some components, such as safety checkers, are beside their pipelines only."""
    package = _pipeline_packages().get(name)
    return getattr(importlib.import_module(package), name, None) if package else None


@functools.cache
def _pipeline_packages() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in _packages(diffusers.pipelines):
        names: Iterable[str] = getattr(package, "_class_to_module", ())
        found |= dict.fromkeys(names, package.__name__)
    return found


def _packages(package: Any) -> Iterator[Any]:
    # Those that diffusers has deprecated are one level deeper.
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if module.ispkg:
            found = importlib.import_module(module.name)
            yield found
            yield from _packages(found)


def _annotations(pipeline_class: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(pipeline_class.__init__) if pipeline_class is not None else {}
    except (NameError, TypeError):
        return {}


def _members(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, list, tuple):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    return [annotation] if annotation is not None and annotation is not Ellipsis else []


def _is_component(member: Any) -> bool:
    return inspect.isclass(member) and hasattr(member, "from_pretrained")

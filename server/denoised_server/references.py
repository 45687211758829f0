"""Components of live pipelines, as the sources that they came from: a recipe outlives the pipelines it was made of."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from denoised.errors import InvalidFieldError

from . import quantization
from .messages import ComponentSource, Derivation, Override, Recipe, Spec

ONE_OF_SEVERAL = re.compile(r"(\w+)\[(\d+)\]")
Named = TypeVar("Named", Spec, Derivation)


@dataclass(frozen=True, slots=True)
class Origin:
    """A live pipeline: how it was made, and the roles of its parts where they are known yet."""

    recipe: Recipe
    roles: tuple[str, ...]


def resolve(named: Named, find: Callable[[str], Origin], field: str) -> Named:
    """The spec or derivation with sources instead of live pipelines, each of which `find` tells. Raises what it does,
    and InvalidFieldError for a part that a pipeline does not have.
    """
    resolved: dict[str, Override] = {}
    for role, override in named.overrides.items():
        place = f"{field}.overrides[{role}]"
        match override:
            case ComponentSource():
                resolved[role] = _resolve(override, find, place)
            case tuple():
                several = (_resolve(each, find, place) for each in override if isinstance(each, ComponentSource))
                resolved[role] = tuple(each for one in several for each in (one if isinstance(one, tuple) else (one,)))
            case _:
                resolved[role] = override
    return replace(named, overrides=resolved) if resolved != named.overrides else named


def _resolve(
    source: ComponentSource, find: Callable[[str], Origin], field: str
) -> ComponentSource | tuple[ComponentSource, ...]:
    if not source.pipeline:
        return source
    origin = find(source.pipeline)
    if origin.roles and source.role not in origin.roles:
        near = difflib.get_close_matches(source.role, origin.roles, 1)
        hint = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(origin.roles)}."
        raise InvalidFieldError.of(f"{field}.role", f"{source.pipeline} has no {source.role!r}.", hint=hint)
    return _source(origin.recipe, source, field)


def _source(recipe: Recipe, wanted: ComponentSource, field: str) -> ComponentSource | tuple[ComponentSource, ...]:
    role, number = wanted.role, None
    if match := ONE_OF_SEVERAL.fullmatch(role):
        role, number = match[1], int(match[2])
    if role == "scheduler" and (scheduler := recipe.settings.noise_scheduler) is not None:
        return ComponentSource(class_name=scheduler.class_name, config=scheduler.config or {})
    replaced: Mapping[str, Override] = {}
    for given in (recipe.spec.overrides, *(step.overrides for step in recipe.derivations)):
        replaced = {**replaced, **given}
    if role not in replaced:
        spec = recipe.spec
        if quantization.of(spec.quantization_config, role) is not None:
            raise InvalidFieldError.of(
                f"{field}.role",
                f"the {role!r} of {wanted.pipeline} is quantised.",
                hint="Derive from the pipeline instead, or load with the same quantization_config.",
            )
        if spec.single_file:
            raise InvalidFieldError.of(
                f"{field}.role",
                f"the {role!r} of {wanted.pipeline} comes from a single file and cannot be named by itself.",
                hint="Derive from that pipeline with `from_pipe`, or load this one from the file as well.",
            )
        return ComponentSource(
            spec.repo_id,
            subfolder=f"{spec.subfolder}/{role}".lstrip("/"),
            revision=spec.revision,
            variant=spec.variant,
            dtype=spec.component_dtypes.get(role, spec.dtype),
            use_safetensors=spec.use_safetensors,
        )
    override = replaced[role]
    if number is not None and isinstance(override, tuple) and number < len(override):
        override = override[number]
    if isinstance(override, ComponentSource):
        return override if override.dtype else replace(override, dtype=recipe.spec.dtype)
    if isinstance(override, tuple):
        sources = (each for each in override if isinstance(each, ComponentSource))
        return tuple(each if each.dtype else replace(each, dtype=recipe.spec.dtype) for each in sources)
    raise InvalidFieldError.of(
        f"{field}.role", f"{wanted.pipeline} was made without a {role!r}.", hint="Name a part that it has."
    )

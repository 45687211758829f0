"""When two recipes mean the same pipeline, and when they share weights."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import fields, replace

from .messages import (
    AdapterCall,
    AdapterSource,
    ComponentSource,
    Derivation,
    Loaded,
    NoiseScheduler,
    PipelineSettings,
    Recipe,
    Spec,
)


def identity(recipe: Recipe) -> Hashable:
    """Equal for recipes that build the same pipeline."""
    derivations = tuple((step.task, _freeze(step.overrides)) for step in recipe.derivations)
    settings = _freeze(recipe.settings)
    return _weights(recipe.spec), recipe.spec.task, _freeze(recipe.spec.overrides), derivations, settings


def derive(recipe: Recipe, derivation: Derivation) -> Recipe:
    """The recipe of what is derived now: it starts with the source's settings, and goes its own way from there."""
    settings = recipe.settings
    if "scheduler" in derivation.overrides:
        settings = replace(settings, noise_scheduler=None)
    return replace(recipe, derivations=(*recipe.derivations, derivation), settings=settings)


def shares_weights(one: Recipe, other: Recipe) -> bool:
    """Whether the two are expected to have components in common."""
    return not _repositories(one).isdisjoint(_repositories(other))


def resolve(recipe: Recipe, loaded: Loaded) -> Recipe:
    """The recipe with the commits that its revisions named; directories have none."""
    if loaded.recipe is not None:
        return replace(recipe, spec=loaded.recipe.spec, derivations=loaded.recipe.derivations)
    return replace(recipe, spec=replace(recipe.spec, revision=loaded.revision)) if loaded.revision else recipe


def _repositories(recipe: Recipe) -> set[Hashable]:
    """Where weights come from, as far as that decides what they are."""
    found: set[Hashable] = {(recipe.spec.repo_id, _revision(recipe.spec), recipe.spec.dtype)}
    for given in (recipe.spec.overrides, *(step.overrides for step in recipe.derivations)):
        for override in given.values():
            for source in override if isinstance(override, tuple) else (override,):
                if isinstance(source, ComponentSource) and source.repo_id:
                    found.add((source.repo_id, _revision(source), source.dtype or recipe.spec.dtype))
    return found


def _revision(source: Spec | ComponentSource) -> str:
    return "" if source.revision == "main" else source.revision


def _weights(spec: Spec) -> Hashable:
    dtypes = spec.dtype, _freeze(spec.component_dtypes)
    quantization = _freeze(spec.quantization_config)
    single_file = spec.single_file, _freeze(spec.config_source)
    named = spec.repo_id, spec.subfolder, _revision(spec), spec.variant
    return *named, dtypes, quantization, spec.use_safetensors, single_file


def _freeze(value: object) -> Hashable:
    match value:
        case Mapping():
            return frozenset((key, _freeze(item)) for key, item in value.items())
        case list() | tuple():
            return tuple(_freeze(item) for item in value)
        case AdapterCall() | AdapterSource() | ComponentSource() | NoiseScheduler() | PipelineSettings():
            return type(value), tuple(_freeze(getattr(value, each.name)) for each in fields(value))
        case _:
            # With its type: True, 1 and 1.0 are equal in Python and different to diffusers.
            return type(value), value

"""Components that callers put in place of a checkpoint's own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from denoised.errors import InvalidFieldError, NotAPipelineError
from denoised_server.messages import ComponentSource, NoiseScheduler, Override
from diffusers import SchedulerMixin
from torch import nn

from . import classes, noise_schedulers, parts, source_rules
from .digests import Digests
from .dtypes import Dtypes
from .parts import Part
from .quotation import quote
from .sources import Sources

CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")


@dataclass(frozen=True, slots=True)
class Weightless:
    """A component without weights: from a folder, or from its configuration alone."""

    role: str
    component_class: Any
    folder: Path | None
    config: Mapping[str, Any]

    def load(self) -> Any:
        """Raises InvalidNoiseSchedulerError, or InvalidFieldError, when its class refuses the configuration."""
        if issubclass(self.component_class, SchedulerMixin):
            return self._scheduler()
        try:
            if self.folder is None:
                return self.component_class.from_config(dict(self.config))
            return self.component_class.from_pretrained(str(self.folder), local_files_only=True, **self.config)
        except Exception as error:
            name = self.component_class.__name__
            raise InvalidFieldError.of(
                f"overrides[{self.role}]", f"no {name} can be made of it: {quote(error)}.", hint="Check its config."
            ) from None

    def _scheduler(self) -> Any:
        name = self.component_class.__name__
        if self.folder is None:
            return noise_schedulers.make(NoiseScheduler(name, self.config), self.component_class())
        config = self.component_class.load_config(str(self.folder), local_files_only=True)
        present = SimpleNamespace(config=config)
        return noise_schedulers.make(NoiseScheduler(name, config, self.config), present)


def sources_of(overrides: Mapping[str, Override]) -> Iterator[tuple[str, ComponentSource]]:
    """Every component by role; several in one role as "controlnet[0]", "controlnet[1]"."""
    for role, override in overrides.items():
        if isinstance(override, ComponentSource):
            yield role, override
        elif isinstance(override, tuple):
            yield from ((f"{role}[{number}]", each) for number, each in enumerate(override) if _is_source(each))


def bring_weights(overrides: Mapping[str, Override]) -> bool:
    """Whether there may be weights to read."""
    return any(source.repo_id for _, source in sources_of(overrides))


def find(
    overrides: Mapping[str, Override], pipeline_class: Any, dtypes: Dtypes, sources: Sources, digests: Digests
) -> list[Part | Weightless]:
    """What the overrides name, nothing of it loaded yet. Raises InvalidFieldError for what cannot fill its role."""
    _check_values(overrides, pipeline_class)
    return [_find(role, source, pipeline_class, dtypes, sources, digests) for role, source in sources_of(overrides)]


def arguments(overrides: Mapping[str, Override], loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` and `from_pipe`, given the components by role."""
    given: dict[str, Any] = {}
    for role, override in overrides.items():
        if isinstance(override, tuple):
            given[role] = [loaded[f"{role}[{number}]"] for number in range(len(override))]
        else:
            given[role] = loaded[role] if isinstance(override, ComponentSource) else override
    return given


def modules(components: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Modules with weights of their own, by role: several in one role count each by itself."""
    found: dict[str, nn.Module] = {}
    for role, component in components.items():
        several = several_in(component)
        if several is not None:
            found |= {f"{role}[{number}]": module for number, module in enumerate(several)}
        elif isinstance(component, nn.Module):
            found[role] = component
    return found


def several_in(component: Any) -> nn.ModuleList | None:
    """What a wrapper such as MultiControlNetModel holds; it has no weights of its own."""
    if "Multi" in type(component).__name__:
        for name in ("nets", "adapters"):
            if isinstance(found := getattr(component, name, None), nn.ModuleList):
                return found
    return None


def _is_source(override: object) -> bool:
    return isinstance(override, ComponentSource)


def _find(
    role: str, source: ComponentSource, pipeline_class: Any, dtypes: Dtypes, sources: Sources, digests: Digests
) -> Part | Weightless:
    field = f"overrides[{role}]"
    if not source.repo_id:
        component_class = classes.find(source.class_name, f"{field}.class_name")
        _check_kind(role, component_class, pipeline_class, field)
        if classes.has_weights(component_class) or not hasattr(component_class, "from_config"):
            raise InvalidFieldError.of(
                f"{field}.repo_id",
                f"a {source.class_name} cannot be made of a configuration alone.",
                hint="Name the repository that has it.",
            )
        return Weightless(role, component_class, None, source.config)
    found = sources.component(source, CONFIGS)
    component_class = classes.find(source.class_name or _class_name(found.folder, role), f"{field}.class_name")
    _check_kind(role, component_class, pipeline_class, field)
    if not classes.has_weights(component_class):
        source_rules.check_options(source.config, field)
        return Weightless(role, component_class, found.folder, source.config)
    if source.config:
        raise InvalidFieldError.of(
            f"{field}.config", "the configuration of weights cannot be changed.", hint="Leave it out."
        )
    dtype = dtypes.of(role)
    if source.dtype:
        dtype = None if source.dtype == "auto" else getattr(torch, source.dtype)
    use_safetensors = sources.rules.use_safetensors(source.use_safetensors)

    part = parts.of_folder(
        role, found.folder, component_class.__name__, source.variant, use_safetensors, dtype, digests
    )
    if part is None:
        raise NotAPipelineError(
            f"The component for {role} has no weight files.", hint="Name the folder that has them as `subfolder`."
        )
    return part


def _class_name(folder: Path, role: str) -> str:
    """The class that the repository names: in the index of the pipeline that it is part of, or in its own config."""
    entry = _json(folder.parent / "model_index.json").get(folder.name)
    if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str):
        return entry[1]
    for name in CONFIGS:
        config = _json(folder / name)
        architectures = config.get("architectures")
        named = [config.get("_class_name"), *(architectures if isinstance(architectures, list) else ())]
        named += [config.get(key) for key in ("tokenizer_class", "image_processor_type", "feature_extractor_type")]
        for class_name in named:
            if isinstance(class_name, str):
                return class_name
    raise NotAPipelineError(
        f"The repository does not say which class the component for {role} is.", hint="Send its class_name."
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _check_kind(role: str, component_class: Any, pipeline_class: Any, field: str) -> None:
    expected = classes.kinds_of_role(pipeline_class, role.partition("[")[0])
    kind = classes.kind_of(component_class)
    if expected and kind not in expected:
        raise InvalidFieldError.of(
            field,
            f"a {component_class.__name__} is a {kind}, and this role takes a {' or a '.join(sorted(expected))}.",
            hint="Check which component belongs there.",
        )


def _check_values(overrides: Mapping[str, Override], pipeline_class: Any) -> None:
    for role, override in overrides.items():
        is_component = role in _roles(pipeline_class) or role == "controlnet"
        if is_component and override is not None and not isinstance(override, ComponentSource | tuple):
            raise InvalidFieldError.of(
                f"overrides[{role}]",
                f"{str(override)[:80]!r} is no component.",
                hint="Name a repository, a part of a live pipeline, or a class with its configuration.",
            )


def _roles(pipeline_class: Any) -> Iterable[str]:
    return pipeline_class._get_signature_keys(pipeline_class)[0] if pipeline_class is not None else ()

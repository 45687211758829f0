"""Configurations, as diffusers shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from .v1 import artifact_pb2, pipeline_service_pb2
from .values import from_proto


class FrozenDict(dict[str, Any]):
    """A configuration: entries are keys and attributes, and cannot be changed.

    Classes of diffusers take it where they take their own: `EulerDiscreteScheduler.from_config(pipe.scheduler.config)`.
    """

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"The configuration has no {name!r}; it has {', '.join(self)}.", name=name, obj=self)

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("A configuration cannot be changed; make another one with `dict(config)`.")

    __setattr__ = __delattr__ = __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (dict(self),)


def from_entries(entries: Mapping[str, artifact_pb2.Value]) -> FrozenDict:
    return FrozenDict({name: from_proto(value) for name, value in entries.items()})


def of_pipeline(info: pipeline_service_pb2.Pipeline) -> FrozenDict:
    """The configuration of a pipeline; each component is a pair of library and class, as in diffusers."""
    entries = {name: _paired(from_proto(value)) for name, value in info.configuration.pipeline.items()}
    return FrozenDict({"_name_or_path": info.spec.repo_id} | entries)


def of_component(info: pipeline_service_pb2.Pipeline, role: str) -> FrozenDict:
    """The configuration of one component; empty for one that has none."""
    known = info.configuration.components
    return from_entries(known[role].entries) if role in known else FrozenDict()


def _paired(value: Any) -> Any:
    is_pair = isinstance(value, list) and len(value) == 2 and all(isinstance(part, str | None) for part in value)
    return tuple(value) if is_pair else value

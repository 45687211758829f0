"""Which component a pipeline calls after which, as its latest run did. Policy only."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

# Pipelines that are remembered.
PIPELINES = 1024


@dataclass(slots=True)
class Succession:
    """By pipeline and component, what came next when it was something else."""

    _next: OrderedDict[str, dict[str, str]] = field(default_factory=OrderedDict)

    def note(self, pipeline: str, before: str, after: str) -> None:
        self._next.setdefault(pipeline, {})[before] = after
        self._next.move_to_end(pipeline)
        if len(self._next) > PIPELINES:
            self._next.popitem(last=False)

    def after(self, pipeline: str, component: str) -> str | None:
        return self._next.get(pipeline, {}).get(component)

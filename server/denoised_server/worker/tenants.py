"""Pipelines as those for whom components are kept: which of them may be moved, and for how long they may be idle.

Policy only: the time is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from denoised_server.messages import Keep


@dataclass(slots=True)
class _Tenant:
    keep: Keep
    last_use: float
    running: int = 0


class Tenants:
    """What was asked for each pipeline, and when it was used last. A pipeline is known from its load on."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}

    def keep(self, pipeline: str, keep: Keep, now: float) -> None:
        """Says how its components are kept from now on, which is a use."""
        known = self._tenants.setdefault(pipeline, _Tenant(keep, now))
        known.keep, known.last_use = keep, now

    def begin(self, pipeline: str, now: float) -> None:
        """A generation of it begins."""
        if (tenant := self._tenants.get(pipeline)) is not None:
            tenant.running, tenant.last_use = tenant.running + 1, now

    def end(self, pipeline: str, now: float) -> None:
        if (tenant := self._tenants.get(pipeline)) is not None:
            tenant.running, tenant.last_use = max(0, tenant.running - 1), now

    def leave(self, pipeline: str) -> None:
        self._tenants.pop(pipeline, None)

    def pin(self, pipelines: Iterable[str]) -> bool:
        """Whether what these pipelines use never leaves."""
        return any(self._tenants[name].keep.pinned for name in pipelines if name in self._tenants)

    def idle_at(self, pipelines: Iterable[str]) -> float:
        """When what these pipelines use has been idle for long enough to leave; infinity for never."""
        return max((self._idle_at(name) for name in pipelines), default=math.inf)

    def _idle_at(self, pipeline: str) -> float:
        tenant = self._tenants.get(pipeline)
        if tenant is None or tenant.running or tenant.keep.pinned or tenant.keep.keep_alive is None:
            return math.inf
        return tenant.last_use + tenant.keep.keep_alive

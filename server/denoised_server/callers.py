"""Who calls: a name, what it may do, and how much of it."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum


class Scope(StrEnum):
    """What a caller may do. ADMIN includes the others, and every client's pipelines."""

    LOAD = "load"
    GENERATE = "generate"
    READ = "read"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Quota:
    """What one client may use at most; None is no limit of its own.

    `running` counts generations on one worker, beyond which the client's others wait; `waiting` counts those that have
    not begun, on all workers, from their arrival on. `pixel_steps` is height × width × steps × images of one request,
    `exclusive_bytes` the weights that only this client's pipelines keep in memory, `priority` the highest that one of
    its requests may have.
    """

    requests_per_minute: int | None = None
    running: int | None = None
    waiting: int | None = None
    pixel_steps: int | None = None
    pipelines: int | None = None
    exclusive_bytes: int | None = None
    priority: int | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sent a request. Its name is empty where the daemon asks for no token."""

    name: str
    scopes: frozenset[Scope] = frozenset(Scope)
    quota: Quota = field(default_factory=Quota)

    @property
    def is_admin(self) -> bool:
        return Scope.ADMIN in self.scopes

    def may(self, scope: Scope) -> bool:
        return self.is_admin or scope in self.scopes

    def sees(self, owner: str, *, shared: bool) -> bool:
        """Whether what belongs to `owner` exists for it."""
        return shared or self.owns(owner)

    def owns(self, owner: str) -> bool:
        """Whether it may change and remove what belongs to `owner`."""
        return self.is_admin or self.name == owner


# What the daemon does of its own accord, and all that is asked of it where it asks for no token.
DAEMON = Caller("")

_current: ContextVar[Caller] = ContextVar("caller", default=DAEMON)


def current() -> Caller:
    """Who sent the request that is being answered; a task that the request starts acts for the same caller."""
    return _current.get()


def act_for(caller: Caller) -> None:
    """From here on, this task answers the caller. Each call has a task of its own, so nothing is set back."""
    _current.set(caller)

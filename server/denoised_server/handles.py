"""Handles: who holds which pipeline, on what lease, built from which recipe."""

from __future__ import annotations

import re
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from denoised.errors import InvalidFieldError, NotOwnerError, PipelineExistsError, PipelineNotFoundError

from . import quotas
from .callers import DAEMON, Caller
from .messages import Keep, Loaded, Recipe
from .paging import page
from .recipes import identity, resolve

PREFIX = "pipelines/"
ID = re.compile(r"[a-z][a-z0-9-]{0,62}")
MAX_REQUEST_ID = 128
REQUEST_MEMORY_SECONDS = 3600.0
# Ten thousand years: the longest google.protobuf.Duration.
LONGEST_SECONDS = 315_576_000_000.0
# Unloaded names are remembered so that an unload may be retried; the oldest are forgotten first.
MAX_TOMBSTONES = 10_000
# The fields of a handle that outlive the process.
KEPT = (
    "number",
    "requested",
    "recipe",
    "source",
    "ttl",
    "create_time",
    "last_use_time",
    "request_id",
    "pinned",
    "keep_alive",
    "owner",
    "shared",
    "preloaded",
    "loaded",
)


class State(StrEnum):
    """Where a pipeline is in its life."""

    LOADING = "loading"
    ACTIVE = "active"
    UNLOADING = "unloading"


@dataclass(slots=True, eq=False)
class Handle:
    """One pipeline that somebody holds. Times are seconds since the epoch.

    `requested` is the recipe as it was asked for, `recipe` the one that builds the same weights again. `worker` is
    empty while no worker holds the weights. While `pins` is above 0 something is using it. One that is `pinned` never
    expires, and is built again at once when it was lost; another one's weights leave the device after `keep_alive`
    seconds without a use. `is_claimed` says that some caller was told of it, `is_kept` that it outlives this process.
    `owner` is the client that made it; others see and use it only when it is `shared`. `preloaded` says that the
    configuration declares it.
    """

    name: str
    number: int
    requested: Recipe
    recipe: Recipe
    source: str
    ttl: float
    create_time: float
    last_use_time: float
    request_id: str = ""
    pinned: bool = False
    keep_alive: float | None = None
    owner: str = ""
    shared: bool = False
    preloaded: bool = False
    state: State = State.LOADING
    worker: str = ""
    loaded: Loaded | None = None
    pins: int = 0
    is_claimed: bool = False
    is_kept: bool = False
    noted_use_time: float = 0.0

    @property
    def expire_time(self) -> float:
        return self.last_use_time + self.ttl

    @property
    def keep(self) -> Keep:
        """How its worker keeps its components."""
        return Keep(self.pinned, self.keep_alive)

    def kept(self) -> dict[str, Any]:
        """What outlives the process."""
        return {name: getattr(self, name) for name in KEPT}

    def is_seen_by(self, caller: Caller) -> bool:
        return caller.sees(self.owner, shared=self.shared)


class HandleTable:
    """Every handle there is, and what is remembered of those that were.

    What a caller may not see does not exist for it; only that an id is taken can be noticed.
    """

    def __init__(self, *, default_ttl: float, max_ttl: float) -> None:
        self._default_ttl = default_ttl
        self._max_ttl = max_ttl
        self._handles: dict[str, Handle] = {}
        self._requests: OrderedDict[tuple[str, str], tuple[str, float]] = OrderedDict()
        # Names, and who owned them.
        self._tombstones: OrderedDict[str, str] = OrderedDict()
        self._last_number = 0

    def __iter__(self) -> Iterator[Handle]:
        return iter(tuple(self._handles.values()))

    def __len__(self) -> int:
        return len(self._handles)

    def __contains__(self, handle: Handle) -> bool:
        """Not by name: a name may belong to another handle by now."""
        return self._handles.get(handle.name) is handle

    def open(
        self,
        recipe: Recipe,
        *,
        now: float,
        ttl: float | None = None,
        pipeline_id: str = "",
        request_id: str = "",
        source: str = "",
        pinned: bool = False,
        keep_alive: float | None = None,
        shared: bool = False,
        caller: Caller = DAEMON,
    ) -> Handle:
        """Returns a new handle, still LOADING.

        A request that was sent before, and a chosen id whose handle has the same recipe, get the handle there is.
        """
        ttl = self._default_ttl if ttl is None else self._check_ttl(ttl)
        if pipeline_id and not ID.fullmatch(pipeline_id):
            raise InvalidFieldError.of(
                "pipeline_id",
                f"{pipeline_id[:64]!r} is not an id.",
                hint="Take 1 to 63 lower-case letters, digits and hyphens, starting with a letter.",
            )
        if len(request_id) > MAX_REQUEST_ID:
            raise InvalidFieldError.of(
                "request_id", f"it is longer than {MAX_REQUEST_ID} characters.", hint="Send a UUID."
            )
        if (known := self._remembered(request_id, now, caller)) is not None:
            if not _means(known, recipe):
                raise InvalidFieldError.of(
                    "request_id", "it was sent with another recipe.", hint="Send a fresh UUID with each new request."
                )
            known.last_use_time = now
            return known
        name = PREFIX + (pipeline_id or f"p{secrets.token_hex(12)}")
        if (known := self._handles.get(name)) is not None:
            if known.state is State.UNLOADING or not (known.is_seen_by(caller) and _means(known, recipe)):
                raise PipelineExistsError(
                    f"{name} is taken by a pipeline with another spec.",
                    hint="Choose another pipeline_id, or unload that one first.",
                    metadata={"pipeline": name},
                )
            known.last_use_time = now
            return known
        quotas.check_pipelines(caller, sum(handle.owner == caller.name for handle in self._handles.values()))
        self._last_number += 1
        handle = Handle(
            name,
            self._last_number,
            recipe,
            recipe,
            source,
            ttl,
            now,
            now,
            request_id,
            pinned=pinned,
            keep_alive=_keep_alive(keep_alive),
            owner=caller.name,
            shared=shared,
        )
        self._handles[name] = handle
        self._tombstones.pop(name, None)
        if request_id:
            self._requests[caller.name, request_id] = name, now + REQUEST_MEMORY_SECONDS
        return handle

    def get(self, name: str, *, field: str = "name", caller: Caller = DAEMON) -> Handle:
        _check_name(name, field)
        handle = self._handles.get(name)
        if handle is None or not handle.is_seen_by(caller):
            raise PipelineNotFoundError(
                f"There is no pipeline {name}; it may have been unloaded, or have expired.",
                hint="Load it again.",
                metadata={"pipeline": name},
            )
        return handle

    def find(self, name: str) -> Handle | None:
        return self._handles.get(name)

    def own(self, name: str, *, caller: Caller = DAEMON) -> Handle:
        """Returns a handle that the caller may change and remove."""
        handle = self.get(name, caller=caller)
        if not caller.owns(handle.owner):
            raise NotOwnerError(
                f"{name} is shared with you, and another client's.",
                hint="Derive a pipeline of your own from it: that takes no memory.",
                metadata={"pipeline": name},
            )
        return handle

    def use(self, name: str, *, now: float, field: str = "name", caller: Caller = DAEMON) -> Handle:
        """Returns a handle that takes new work, and starts its lease anew."""
        handle = self.get(name, field=field, caller=caller)
        if handle.state is State.UNLOADING:
            raise PipelineNotFoundError(
                f"{name} is being unloaded.", hint="Load it again.", metadata={"pipeline": name}
            )
        handle.last_use_time = now
        return handle

    def activate(self, handle: Handle, *, worker: str, loaded: Loaded, now: float) -> None:
        """Records that a worker holds the handle's pipeline."""
        handle.recipe = resolve(handle.recipe, loaded)
        handle.worker, handle.loaded = worker, loaded
        if handle.state is State.LOADING:
            handle.state = State.ACTIVE
            handle.last_use_time = now

    def update(self, handle: Handle, loaded: Loaded) -> None:
        """Records what the worker that holds the handle's pipeline has set on it."""
        handle.recipe = replace(handle.recipe, settings=loaded.settings)
        handle.loaded = loaded

    def restore(self, kept: Mapping[str, Mapping[str, Any]], unloaded: Iterable[str], now: float) -> None:
        """Brings back what an earlier process kept. The pipelines are built again at their next use."""
        for name, fields in sorted(kept.items(), key=lambda item: item[1]["number"]):
            known = {field: value for field, value in fields.items() if field in KEPT}
            handle = Handle(name=name, **known, state=State.ACTIVE, is_claimed=True, is_kept=True)
            handle.noted_use_time = handle.last_use_time
            self._handles[name] = handle
            self._last_number = max(self._last_number, handle.number)
            until = handle.create_time + REQUEST_MEMORY_SECONDS
            if handle.request_id and until > now:
                self._requests[handle.owner, handle.request_id] = name, until
        # Whose they were is not kept: only where there are no tokens, and for an admin, they are still known.
        self._tombstones.update(dict.fromkeys(unloaded, ""))

    def uses_to_note(self) -> dict[str, float]:
        """When kept handles were used last, of those that were used since this was asked before."""
        used = [handle for handle in self._handles.values() if handle.is_kept and _was_used(handle)]
        for handle in used:
            handle.noted_use_time = handle.last_use_time
        return {handle.name: handle.last_use_time for handle in used}

    def lose(self, worker: str) -> None:
        """Records that a worker died: its handles stay, and are built again at their next use."""
        for handle in self._handles.values():
            if handle.worker == worker:
                handle.worker = ""

    def renew(
        self,
        name: str,
        *,
        now: float,
        ttl: float | None = None,
        pinned: bool | None = None,
        keep_alive: float | None = None,
        caller: Caller = DAEMON,
    ) -> Handle:
        ttl = None if ttl is None else self._check_ttl(ttl)
        handle = self.use(self.own(name, caller=caller).name, now=now, caller=caller)
        handle.ttl = handle.ttl if ttl is None else ttl
        handle.pinned = handle.pinned if pinned is None else pinned
        handle.keep_alive = handle.keep_alive if keep_alive is None else _keep_alive(keep_alive)
        return handle

    def expired(self, now: float) -> list[Handle]:
        """Handles whose lease has run out and that nothing uses."""
        return [
            handle
            for handle in self._handles.values()
            if handle.state is State.ACTIVE and not (handle.pinned or handle.pins) and handle.expire_time <= now
        ]

    def remove(self, handle: Handle) -> None:
        """Forgets a handle, all but that it was there."""
        del self._handles[handle.name]
        self._requests.pop((handle.owner, handle.request_id), None)
        self._tombstones[handle.name] = handle.owner
        while len(self._tombstones) > MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)

    def is_leaving(self, name: str, request_id: str, now: float, *, caller: Caller = DAEMON) -> bool:
        """Whether the name, or what the request was answered with before, is a handle that will be removed."""
        known = (self._handles.get(name), self._remembered(request_id, now, caller))
        return any(handle is not None and handle.state is State.UNLOADING for handle in known)

    def is_gone(self, name: str, *, caller: Caller = DAEMON) -> bool:
        """Whether the name belonged to a handle of the caller's that was removed."""
        _check_name(name, "name")
        return name in self._tombstones and caller.owns(self._tombstones[name])

    def page(self, *, size: int, token: str, caller: Caller = DAEMON) -> tuple[list[Handle], str]:
        """One page of the handles that the caller sees, oldest first, and the token of the next page."""
        seen = [handle for handle in self._handles.values() if handle.is_seen_by(caller)]
        return page(seen, key=lambda handle: handle.number, size=size, token=token)

    def _remembered(self, request_id: str, now: float, caller: Caller) -> Handle | None:
        while self._requests and next(iter(self._requests.values()))[1] <= now:
            self._requests.popitem(last=False)
        name, _ = self._requests.get((caller.name, request_id), ("", 0.0))
        return self._handles.get(name)

    def _check_ttl(self, ttl: float) -> float:
        if ttl < 1:
            raise InvalidFieldError.of("ttl", f"{ttl:g} s is too short.", hint="Send at least one second.")
        return min(ttl, self._max_ttl)


def _keep_alive(seconds: float | None) -> float | None:
    """Less than none at all means without end; so does what no Duration can say, and what could not be told again."""
    return None if seconds is None or not 0 <= seconds <= LONGEST_SECONDS else seconds


def _was_used(handle: Handle) -> bool:
    return handle.last_use_time > handle.noted_use_time


def _means(handle: Handle, recipe: Recipe) -> bool:
    return identity(recipe) in (identity(handle.requested), identity(handle.recipe))


def _check_name(name: str, field: str) -> None:
    if not (name.startswith(PREFIX) and ID.fullmatch(name.removeprefix(PREFIX))):
        raise InvalidFieldError.of(
            field, f"{name[:80]!r} is not the name of a pipeline.", hint='Names have the form "pipelines/{id}".'
        )

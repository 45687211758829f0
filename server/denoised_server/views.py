"""What callers are shown of a pipeline: its handle, and what it costs beside the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from .handles import Handle, State
from .messages import Component, Loaded, Planned, Ready, Recipe, Snapshot
from .supervision import WorkerState

# From the closest to the computation to the farthest from it.
TIERS = ("device", "host", "disk")


@dataclass(frozen=True, slots=True)
class ComponentView:
    """One component of a pipeline, how many pipelines use the copy, and where it is."""

    component: Component
    sharer_count: int
    residency: str


@dataclass(frozen=True, slots=True)
class PipelineView:
    """One pipeline at one moment. Times are seconds since the epoch; no other pipeline ever has the same number."""

    name: str
    number: int
    recipe: Recipe
    source: str
    state: State
    worker: str
    loaded: Loaded | None
    components: tuple[ComponentView, ...]
    exclusive_bytes: int
    shared_bytes: int
    bytes_by_tier: Mapping[str, int]
    residency: str
    generation_count: int
    create_time: float
    last_use_time: float
    expire_time: float
    pinned: bool
    keep_alive: float | None
    owner: str
    shared: bool


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker at one moment; no snapshot while there is none of its present life."""

    name: str
    state: WorkerState
    ready: Ready
    snapshot: Snapshot | None
    running_count: int
    waiting_count: int
    restart_count: int
    pipeline_count: int

    @property
    def shared_saved_bytes(self) -> int:
        return self.snapshot.shared_saved_bytes if self.snapshot else 0


@dataclass(frozen=True, slots=True)
class PlanView:
    """What loading a pipeline would take, on which worker, and the names of the pipelines that its caller sees."""

    worker: str
    planned: Planned
    seen: frozenset[str]


class Census(Mapping[str, PipelineView]):
    """Every pipeline at one moment, by name, given what the workers reported and how many generations each has.

    Views are made when they are asked for: most askers want one of thousands.
    """

    def __init__(
        self, handles: Iterable[Handle], snapshots: Mapping[str, Snapshot | None], generations: Mapping[str, int]
    ) -> None:
        self._handles = {handle.name: handle for handle in handles}
        self._generations = generations
        # Handles by worker and digest: a component that fills two roles of one pipeline has one user.
        self._users = Counter(
            (handle.worker, digest) for handle in self._handles.values() if handle.worker for digest in _digests(handle)
        )
        self._tiers = {
            (worker, held.digest): held.residency
            for worker, snapshot in snapshots.items()
            if snapshot is not None
            for held in snapshot.components
        }
        self._views: dict[str, PipelineView] = {}

    def __getitem__(self, name: str) -> PipelineView:
        if name not in self._views:
            handle = self._handles[name]
            self._views[name] = _view(handle, self._users, self._tiers, self._generations.get(name, 0))
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)


def owned_bytes(handles: Iterable[Handle], owner: str) -> int:
    """Weights that go away when this client's pipelines do, each counted once."""
    owners: dict[tuple[str, str], set[str]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for handle in handles:
        for part in handle.loaded.components if handle.loaded and handle.worker else ():
            owners.setdefault((handle.worker, part.digest), set()).add(handle.owner)
            sizes[handle.worker, part.digest] = part.weight_bytes
    return sum(size for part, size in sizes.items() if owners[part] == {owner})


def _view(
    handle: Handle, users: Mapping[tuple[str, str], int], tiers: Mapping[tuple[str, str], str], generation_count: int
) -> PipelineView:
    components = []
    exclusive, shared = dict[str, int](), dict[str, int]()
    by_tier = {tier: dict[str, int]() for tier in TIERS}
    for component in handle.loaded.components if handle.loaded else ():
        key = handle.worker, component.digest
        count = users.get(key, 0)
        # A worker that has just loaded it has not reported it yet.
        residency = tiers.get(key, "device") if handle.worker else "disk"
        components.append(ComponentView(component, count, residency))
        if component.digest:
            # A component that fills two roles is there once.
            by_tier[residency][component.digest] = component.weight_bytes
        if count:
            (shared if count > 1 else exclusive)[component.digest] = component.weight_bytes
    weighing = [view.residency for view in components if view.component.digest]
    return PipelineView(
        name=handle.name,
        number=handle.number,
        recipe=handle.recipe,
        source=handle.source,
        state=handle.state,
        worker=handle.worker,
        loaded=handle.loaded,
        components=tuple(components),
        exclusive_bytes=sum(exclusive.values()),
        shared_bytes=sum(shared.values()),
        bytes_by_tier={tier: sum(sizes.values()) for tier, sizes in by_tier.items()},
        residency=max(weighing, key=TIERS.index, default="device" if handle.worker else "disk"),
        generation_count=generation_count,
        create_time=handle.create_time,
        last_use_time=handle.last_use_time,
        expire_time=handle.expire_time,
        pinned=handle.pinned,
        keep_alive=handle.keep_alive,
        owner=handle.owner,
        shared=handle.shared,
    )


def _digests(handle: Handle) -> set[str]:
    return {part.digest for part in handle.loaded.components if part.digest} if handle.loaded else set()

"""What a load would take, told without loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from denoised_server.messages import Access, Planned, PlannedComponent, Recipe

from . import checkpoint, weights
from .components import ComponentStore
from .construction import Construction
from .digests import Digests
from .downloads import Downloads
from .parts import Part
from .residency import Residency
from .sketches import Sketches
from .sources import Sources
from .tiers import Bandwidths, Tier


class Planner:
    """Plans any number of loads beside each other and beside whatever else goes on."""

    def __init__(
        self,
        store: ComponentStore,
        residency: Residency,
        sources: Sources,
        construction: Construction,
        digests: Digests,
        load_speed: Bandwidths,
    ) -> None:
        self._store, self._residency, self._sources = store, residency, sources
        self._construction, self._digests, self._load_speed = construction, digests, load_speed

    def plan(self, recipe: Recipe, access: Access, check_cancelled: Callable[[], None]) -> Planned:
        """Raises what loading would raise before it reads weights, but not that there is no room."""
        if access.local_files_only:
            fetched = self._sources.fetch(recipe, Downloads(access, lambda progress: None, check_cancelled))
            return self._plan(self._parts(fetched, self._sources, self._digests), 0)
        with Sketches(access, self._sources.hub_cache, check_cancelled) as sketches:
            sources = self._sources.with_cache(sketches.cache)
            fetched = sources.fetch(recipe, sketches)
            parts = self._parts(fetched, sources, self._digests.with_cache(sketches.cache))
            return self._plan(parts, sketches.download_bytes)

    def _parts(self, recipe: Recipe, sources: Sources, digests: Digests) -> Mapping[str, tuple[Part, dict[str, int]]]:
        """By role, the part and the bytes in its files."""
        found = checkpoint.find(recipe.spec, sources, digests, self._construction)
        return {part.role: (part, weights.stored_bytes(part.files)) for part in found.parts}

    def _plan(self, parts: Mapping[str, tuple[Part, dict[str, int]]], download_bytes: int) -> Planned:
        sizes = {part.digest: part.memory_bytes for part, _ in parts.values()}
        foresight = self._residency.foresee(sizes)
        return Planned(
            outcome=foresight.outcome,
            components=tuple(
                PlannedComponent(
                    role=role,
                    class_name=part.class_name,
                    digest=part.digest,
                    weight_bytes=part.memory_bytes,
                    dtype=str(part.dtype).removeprefix("torch."),
                    file_bytes=stored,
                    is_held=part.digest in self._store,
                )
                for role, (part, stored) in parts.items()
            ),
            new_bytes=foresight.new_bytes,
            shared_bytes=sum(sizes.values()) - foresight.new_bytes,
            free_bytes=foresight.free_bytes,
            evictable_bytes=foresight.evictable_bytes,
            budget_bytes=foresight.budget_bytes,
            evicted=foresight.leaving,
            download_bytes=download_bytes,
            load_seconds=self._load_speed.seconds(Tier.DISK, foresight.new_bytes),
        )

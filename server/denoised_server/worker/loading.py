"""From a recipe to a live pipeline, with components that are held already instead of second copies."""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from denoised.errors import DamagedWeightsError, DenoisedError, NotAPipelineError, TaskNotSupportedError
from denoised_server.messages import (
    Access,
    Component,
    Derivation,
    LoadedAdapter,
    LoadProgress,
    PipelineSettings,
    Recipe,
    Spec,
)
from diffusers import DiffusionPipeline
from torch import nn

from . import checkpoint, components, families, features, fit, noise_schedulers, overrides
from .adaptation import Adaptation
from .adapter_methods import loaded_adapters
from .adapters import AdapterStore
from .components import ComponentStore
from .configuration import configure
from .construction import Construction
from .digests import Digests
from .downloads import REPORT_SECONDS, Downloads
from .dtypes import Dtypes
from .memory_counts import MemoryCounts
from .overrides import Weightless
from .pages import ReadAhead
from .parts import Part
from .quotation import quote
from .reading import Reading
from .residency import Reservation, Residency
from .sources import Sources
from .tiers import Bandwidths, Tier

logger = logging.getLogger(__name__)

Wanted = TypeVar("Wanted", Recipe, Derivation)


@dataclass(slots=True)
class Live:
    """A pipeline in memory. Requests run on views of it and never change it.

    `built` is as the checkpoint has it, `pipeline` has the settings, of which `adaptation` is about its adapters.
    `recipe` builds it again, all but the settings.
    """

    built: DiffusionPipeline
    pipeline: DiffusionPipeline
    task: str
    dtypes: Dtypes
    components: tuple[Component, ...]
    recipe: Recipe
    settings: PipelineSettings = field(default_factory=PipelineSettings)
    adaptation: Adaptation = field(default_factory=Adaptation)
    adapters: tuple[LoadedAdapter, ...] = ()

    @property
    def modules(self) -> list[nn.Module]:
        """Its components with weights, without what adapters made of them."""
        return [*overrides.modules(self.built.components).values()]


@dataclass(frozen=True, slots=True)
class Released:
    """Components that nobody uses any more: their bytes, and what shows that they are really gone."""

    freed_bytes: int
    modules: tuple[weakref.ref[nn.Module], ...]


class Loader:
    """Builds pipelines. One at a time that has weights to read; deriving without any may go on beside it."""

    def __init__(
        self,
        store: ComponentStore,
        residency: Residency,
        sources: Sources,
        adapters: AdapterStore,
        construction: Construction,
        device: torch.device,
        digests: Digests,
        counts: MemoryCounts,
    ) -> None:
        self._store, self._residency, self._sources, self._adapters = store, residency, sources, adapters
        self._construction, self._device = construction, device
        self._digests, self._counts = digests, counts
        # Of whole loads, with the building of modules, which takes its time too.
        self.speed = Bandwidths()

    def fetch(
        self,
        wanted: Wanted,
        access: Access,
        progress: Callable[[LoadProgress], None],
        check_cancelled: Callable[[], None],
    ) -> Wanted:
        """Downloads what of a recipe or derivation is on the Hub, and returns it with its revisions resolved.

        Any number may go on beside each other, and beside loads.
        """
        downloads = Downloads(access, progress, check_cancelled)
        if isinstance(wanted, Recipe):
            return self._sources.fetch(wanted, downloads)
        return self._sources.fetch_derivation(wanted, downloads)

    def load(
        self,
        user: str,
        recipe: Recipe,
        progress: Callable[[LoadProgress], None],
        check_cancelled: Callable[[], None],
    ) -> Live:
        """Builds the recipe's pipeline for the handle `user`. A failed or cancelled load leaves nothing behind.

        Raises what `denoised.errors` has for loads, and what `check_cancelled` raises.
        """
        progress(LoadProgress("looking up", "", 0, 0))
        try:
            live = self._load_spec(user, recipe.spec, progress, check_cancelled)
            for derivation in recipe.derivations:
                live = self.derive(user, live, derivation, PipelineSettings(), progress, check_cancelled)
            # What a derivation took out is not held for its sake.
            self._release(user, keep=live.modules)
            return self.update(user, live, recipe.settings)
        except BaseException:
            self.release(user)
            raise

    def derive(
        self,
        user: str,
        source: Live,
        derivation: Derivation | None,
        settings: PipelineSettings,
        progress: Callable[[LoadProgress], None],
        check_cancelled: Callable[[], None],
    ) -> Live:
        """A pipeline for another task from a live one's components, as `from_pipe` makes it; a twin without one.

        A failed or cancelled derivation leaves nothing behind for the handle `user`.
        """
        try:
            if derivation is None:
                built, task = source.built, source.task
            else:
                built, task = self._from_pipe(user, source, derivation, progress, check_cancelled), derivation.task
            recipe = source.recipe
            if derivation is not None:
                recipe = replace(recipe, derivations=(*recipe.derivations, derivation))
            live = Live(built, built, task, source.dtypes, self._describe(built), recipe)
            self._store.share(live.modules, user)
            return self.update(user, live, settings)
        except BaseException:
            self.release(user)
            raise

    def update(self, user: str, live: Live, settings: PipelineSettings) -> Live:
        """The same pipeline with these settings. Raises InvalidNoiseSchedulerError and what AdapterStore does."""
        features.check(live.built, settings.features)
        calls = tuple(self._adapters.resolve(call) for call in settings.adapters)
        adaptation = Adaptation().after(calls, self._adapters.find)
        settings = replace(settings, adapters=calls)
        adapted = self._adapters.adapt(live.built, adaptation, user)
        try:
            # Makes tensors, as requests do.
            with self._construction.turn():
                pipeline = configure(adapted.pipeline, settings)
            self._adapters.hold(user, adapted)
        finally:
            self._adapters.unpin(adapted)
        # With its whole configuration: what it was made from may have another one by the next time.
        if settings.noise_scheduler is not None:
            settings = replace(settings, noise_scheduler=noise_schedulers.describe(pipeline.scheduler))
        return replace(
            live,
            pipeline=pipeline,
            components=(*self._describe(live.built), *self._adapters.describe(adaptation, adapted)),
            settings=settings,
            adaptation=adaptation,
            adapters=loaded_adapters(adapted.pipeline, adaptation),
        )

    def release(self, user: str) -> Released:
        """Lets go of what only this handle uses."""
        self._adapters.hold(user, None)
        return self._release(user)

    def _release(self, user: str, keep: Iterable[nn.Module] = ()) -> Released:
        gone = self._store.release(user, keep)
        self._adapters.prune()
        return Released(self._residency.forget(gone), tuple(weakref.ref(held.module) for held in gone))

    def _load_spec(
        self,
        user: str,
        spec: Spec,
        progress: Callable[[LoadProgress], None],
        check_cancelled: Callable[[], None],
    ) -> Live:
        found = checkpoint.find(
            spec,
            self._sources,
            self._digests,
            self._construction,
            learn=lambda files: self._learn(files, progress, check_cancelled),
        )
        try:
            pipeline = self._build(user, {}, found.own, found.brought, found.make, progress, check_cancelled)
        except DenoisedError:
            raise
        except Exception as error:
            raise checkpoint.load_error(found.spec, found.class_name, error) from None
        task = spec.task or families.task_of(pipeline)
        return Live(pipeline, pipeline, task, found.dtypes, self._describe(pipeline), Recipe(found.spec))

    def _learn(
        self, files: Iterable[Path], progress: Callable[[LoadProgress], None], check_cancelled: Callable[[], None]
    ) -> None:
        """Reads the files whose content is not known yet, which also brings them into the page cache."""
        told = [-math.inf]

        def report(done: int, total: int) -> None:
            if (now := time.monotonic()) - told[0] >= REPORT_SECONDS:
                told[0] = now
                progress(LoadProgress("looking up", "", done, total))

        self._digests.learn(files, report, check_cancelled)

    def _from_pipe(
        self,
        user: str,
        source: Live,
        derivation: Derivation,
        progress: Callable[[LoadProgress], None],
        check_cancelled: Callable[[], None],
    ) -> DiffusionPipeline:
        class_name = type(source.built).__name__
        families.check_overrides(derivation.overrides, class_name, source.built.config, derivation.task)

        def make(ready: Mapping[str, Any]) -> DiffusionPipeline:
            given = overrides.arguments(derivation.overrides, ready)
            pipeline: DiffusionPipeline = families.auto_class(derivation.task).from_pipe(source.built, **given)
            fit.check(pipeline, derivation.task)
            return pipeline

        try:
            foreign = overrides.find(
                derivation.overrides, type(source.built), source.dtypes, self._sources, self._digests
            )
            kept = {
                part.digest: part.weight_bytes
                for part in source.components
                if part.digest and part.role.partition("[")[0] not in derivation.overrides
            }
            return self._build(user, kept, [], foreign, make, progress, check_cancelled)
        except DenoisedError:
            raise
        except ValueError as error:
            raise TaskNotSupportedError(
                f"A {class_name} cannot be made into a pipeline for {derivation.task}: {quote(error)}.",
                hint=families.supported(class_name),
            ) from None
        except Exception as error:
            logger.debug("deriving failed", exc_info=error)
            raise NotAPipelineError(
                f"diffusers cannot make a pipeline for {derivation.task} of it: {quote(error)}.",
                hint="Check that the components fit each other.",
            ) from None

    def _build(
        self,
        user: str,
        kept: Mapping[str, int],
        own: list[Part],
        foreign: list[Part | Weightless],
        make: Callable[[Mapping[str, Any]], DiffusionPipeline],
        progress: Callable[[LoadProgress], None],
        check_cancelled: Callable[[], None],
    ) -> DiffusionPipeline:
        """A pipeline with all its weights on the device and in the books.

        `kept` are the bytes, by digest, of what it takes over from a live one. `make` is given what is loaded already,
        by role.
        """
        weighing = [*own, *(part for part in foreign if isinstance(part, Part))]
        # Acquired before they are planned: what is held now stays.
        held = {part.digest: self._store.acquire(part.digest, user) for part in weighing}
        reservation = self._adapters.reserve({**kept, **{part.digest: part.memory_bytes for part in weighing}})
        measured: dict[str, int] = {}
        try:
            shared = reservation.shared_bytes - sum(kept.values())
            reading = Reading(weighing, shared, progress, check_cancelled)
            files = [file for part in weighing if held[part.digest] is None for file in part.files]
            ready: dict[str, Any] = {}
            began = time.monotonic()
            with ReadAhead(files), self._construction.loading(), reading:
                for part in foreign:
                    if isinstance(part, Weightless):
                        ready[part.role] = part.load()
                    else:
                        # One module for content that is named twice.
                        held[part.digest] = held[part.digest] or reading.over(part.role, part.load)
                for part in weighing:
                    if (module := held[part.digest]) is not None:
                        ready[part.role] = module
                pipeline = make(ready)
            check_cancelled()
            self._check_unchanged(files)
            with _Moving(reading.total_bytes, shared, progress, check_cancelled) as moving:
                self._hold(user, pipeline, weighing, reservation, measured, moving)
            self.speed.learn(Tier.DISK, reservation.new_bytes, time.monotonic() - began)
            if not reservation.below:
                self._counts.estimated("weights", reservation.new_bytes, sum(measured.values()))
        finally:
            self._residency.settle(reservation, measured)
        return pipeline

    def _check_unchanged(self, files: Iterable[Path]) -> None:
        """What was read is what the components are known by."""
        for path in files:
            if not self._digests.is_known(path):
                raise DamagedWeightsError(
                    f"The weight file {path.parent.name}/{path.name} has changed while it was loaded.",
                    hint="Load the checkpoint when it has been written to its end.",
                )

    def _hold(
        self,
        user: str,
        pipeline: DiffusionPipeline,
        found: list[Part],
        reservation: Reservation,
        measured: dict[str, int],
        moving: _Moving,
    ) -> None:
        """Moves what is new to the device, or to a lower tier, and enters it into the store, under its content where
        files identify it.
        """
        digests = {part.role: part.digest for part in found}
        files = {part.role: part.files for part in found}
        for role, module in overrides.modules(pipeline.components).items():
            if self._store.find(module) is not None:
                continue
            digest = digests.get(role, f"object:{id(module):x}")
            if (twin := self._store.acquire(digest, user)) is not None:
                # The same content in two roles of one checkpoint.
                pipeline.register_modules(**{role: twin})
                continue
            below = reservation if digest in reservation.below else None
            with moving.of(role) as moved:
                # Asking each module costs more than the rest of this where all are there.
                if below is None and self._device.type != "cpu":
                    module.to(self._device)
                held = self._residency.add(digest, module, user, files.get(role, ()), below=below)
                measured[digest] = held.device_bytes
                moved(held.weight_bytes)

    def _describe(self, pipeline: DiffusionPipeline) -> tuple[Component, ...]:
        described = []
        for role, part in pipeline.components.items():
            if part is None:
                continue
            inner = overrides.modules({role: part})
            if role not in inner:
                described.append(Component(role, type(part).__name__))
            for name, module in inner.items():
                class_name = type(module).__name__
                if (held := self._store.find(module)) is None:
                    described.append(Component(name, class_name))
                else:
                    dtype = components.dtype_name(module)
                    described.append(Component(name, class_name, held.digest, held.weight_bytes, dtype))
        return tuple(described)


class _Moving:
    """Tells how much of what was read has been moved, and stops it when the load is cancelled."""

    def __init__(
        self,
        total_bytes: int,
        shared_bytes: int,
        progress: Callable[[LoadProgress], None],
        check_cancelled: Callable[[], None],
    ) -> None:
        self._total, self._done, self._told = total_bytes, shared_bytes, -math.inf
        self._progress, self._check_cancelled = progress, check_cancelled

    def __enter__(self) -> _Moving:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._progress(LoadProgress("moving to device", "", self._total, self._total))

    @contextmanager
    def of(self, role: str) -> Iterator[Callable[[int], None]]:
        """Around the move of one component; what is yielded is told of its bytes."""

        def moved(size: int) -> None:
            self._check_cancelled()
            self._done = min(self._done + size, self._total)
            if (now := time.monotonic()) - self._told >= REPORT_SECONDS:
                self._told = now
                self._progress(LoadProgress("moving to device", role, self._done, self._total))

        moved(0)
        yield moved

"""Adapters of shared components: each file in memory once, each combination a twin of the components it changes.

A combination is made with diffusers' own calls, one step after another, on twins of the components; the components
themselves are never touched, so whoever uses them without adapters computes with the same bits as before. Requests
with the same combination get the same twins, and so their calls join; those with others do not.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import logging
import threading
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from denoised.errors import (
    AdapterMismatchError,
    DamagedWeightsError,
    DenoisedError,
    DeviceOutOfMemoryError,
)
from denoised_server.messages import AdapterCall, AdapterSource, Component
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import nn

from . import adapter_methods as methods
from . import ip_adapter, seam
from .adaptation import Adaptation, File, Step
from .components import ComponentStore, dtype_name
from .construction import Construction
from .digests import Digests
from .quotation import quote
from .residency import Reservation, Residency
from .sources import Sources
from .twins import IDENTITY, Fresh, Untouched, twin

logger = logging.getLogger(__name__)

# Combinations that are kept for the next request although none uses them now.
MAX_IDLE = 16


@dataclass(slots=True, eq=False)
class Variant:
    """What one step made: new values of a pipeline's attributes, and the weights that they need.

    `components` are others that it brought, `roots` those that it was made of, `parts` what the step was made on, kept
    so that their names stay theirs, and `parent` the variant that those came from. `pins` counts running requests,
    `holders` are the handles whose own adapters these are.
    """

    changes: dict[str, Any]
    weights: tuple[str, ...]
    components: tuple[str, ...]
    roots: tuple[str, ...]
    parts: tuple[Any, ...]
    parent: Variant | None
    pins: int = 0
    holders: set[str] = field(default_factory=set)

    @property
    def needs(self) -> tuple[str, ...]:
        return (*self.weights, *self.components)

    @property
    def is_idle(self) -> bool:
        return not self.pins and not self.holders

    def chain(self) -> Iterator[Variant]:
        variant: Variant | None = self
        while variant is not None:
            yield variant
            variant = variant.parent


@dataclass(frozen=True, slots=True)
class Adapted:
    """A pipeline with adapters; without a variant, one that has none."""

    pipeline: DiffusionPipeline
    variant: Variant | None = None

    def chain(self) -> Iterator[Variant]:
        return self.variant.chain() if self.variant is not None else iter(())


class AdapterStore:
    """Owns adapters and what was made with them. Used from loading threads; one thing is made at a time."""

    def __init__(
        self,
        store: ComponentStore,
        residency: Residency,
        sources: Sources,
        construction: Construction,
        digests: Digests,
    ) -> None:
        self._store, self._residency, self._sources = store, residency, sources
        self._construction, self._digests = construction, digests
        self._variants: OrderedDict[Hashable, Variant] = OrderedDict()
        self._lock = threading.RLock()

    def find(self, source: AdapterSource) -> File:
        """The file of an adapter, with the digest of its content. Raises what `denoised.errors` has for loads."""
        found = self._sources.adapter(source)
        try:
            with safe_open(found.folder, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            logger.debug("an adapter cannot be opened", exc_info=error)
            raise DamagedWeightsError(
                f"The adapter {found.folder.name!r} is damaged: it cannot be read as safetensors.",
                hint="Download or save it again.",
            ) from None
        return File(found.folder, self._digests.of_file(found.folder), found.revision)

    def resolve(self, call: AdapterCall) -> AdapterCall:
        """The call with the commits that the revisions of its sources named, and the files that were chosen there."""
        return replace(call, sources=tuple(map(self._resolved, call.sources)))

    def _resolved(self, source: AdapterSource) -> AdapterSource:
        file = self.find(source)
        # A directory may have another file by the next time, as it may have other content.
        return replace(source, revision=file.revision, weight_name=file.path.name) if file.revision else source

    def adapt(self, pipeline: DiffusionPipeline, adaptation: Adaptation, user: str) -> Adapted:
        """A view of the pipeline with these adapters, for the handle `user`; to be let go of with `unpin`.

        What cannot be made leaves nothing. Raises AdapterMismatchError, NeverFitsError and NoRoomError.
        """
        adapted = Adapted(pipeline)
        with self._lock:
            before = set(self._variants)
            try:
                for step in adaptation.steps:
                    adapted = self._apply(adapted, step, user)
            except BaseException:
                self._drop([key for key in self._variants if key not in before])
                raise
            for variant in adapted.chain():
                variant.pins += 1
        return adapted

    def unpin(self, adapted: Adapted) -> None:
        """A request is over, or a handle holds them."""
        with self._lock:
            for variant in adapted.chain():
                variant.pins -= 1
            self._shed(MAX_IDLE)

    def hold(self, user: str, adapted: Adapted | None) -> None:
        """These, and no others any more, are the handle's own adapters; what it alone held is gone at once."""
        with self._lock:
            left = {id(variant): variant for variant in self._variants.values() if user in variant.holders}
            for variant in left.values():
                variant.holders.discard(user)
            for variant in adapted.chain() if adapted else ():
                variant.holders.add(user)
            self._drop([key for key, variant in self._variants.items() if id(variant) in left and variant.is_idle])
            needed = {digest for variant in (adapted.chain() if adapted else ()) for digest in variant.needs}
            self._leave({digest for variant in left.values() for digest in variant.needs} - needed, user)
            self.prune()

    def prune(self) -> None:
        """Forgets what was made of components that are gone."""
        with self._lock:
            for key, variant in list(self._variants.items()):
                if not all(digest in self._store for digest in (*variant.roots, *variant.needs)):
                    del self._variants[key]

    def describe(self, adaptation: Adaptation, adapted: Adapted) -> tuple[Component, ...]:
        """The weights that adapters bring, as parts of a pipeline."""
        names = {lora.content: lora.name for lora in adaptation.loras}
        described: list[Component] = []
        for variant in reversed(list(adapted.chain())):
            for held in filter(None, map(self._store.get, variant.needs)):
                role = f"adapter {names.get(vars(held.module).get('content', ''), len(described))}"
                dtype = dtype_name(held.module)
                described.append(Component(role, type(held.module).__name__, held.digest, held.weight_bytes, dtype))
        return tuple(described)

    def _apply(self, adapted: Adapted, step: Step, user: str) -> Adapted:
        pipeline = adapted.pipeline
        family = methods.family(pipeline, step)
        if (folder := methods.encoder_folder(pipeline, step)) is not None:
            pipeline = copy.copy(pipeline)
            vars(pipeline)["image_encoder"] = self._image_encoder(pipeline, step, folder, adapted, user)
        parts = {role: getattr(pipeline, role) for role in methods.roles(pipeline, step)}
        given = self._name(pipeline.image_encoder) if folder is not None else ""
        key = (family, *((role, self._name(part)) for role, part in parts.items()), given, step.key)
        variant = self._variants.get(key)
        if variant is None:
            made_on = Adapted(pipeline, adapted.variant)
            modules = [part for part in parts.values() if isinstance(part, nn.Module)]
            try:
                with self._residency.holding(modules):
                    variant = self._make(made_on, step, parts, key, (given,) if given else (), user)
                self._variants[key] = variant
            except BaseException:
                self._leave({given} - {digest for each in adapted.chain() for digest in each.needs}, user)
                raise
        self._variants.move_to_end(key)
        for digest in variant.needs:
            self._store.acquire(digest, user)
        view = copy.copy(pipeline)
        # Not by setattr, which would rewrite the configuration that the view shares.
        vars(view).update(variant.changes)
        return Adapted(view, variant)

    def _image_encoder(
        self, pipeline: DiffusionPipeline, step: Step, folder: str, adapted: Adapted, user: str
    ) -> nn.Module:
        """The component in the store; there it stays for as long as somebody uses it."""
        encoder = ip_adapter.find(step.sources[0], folder, pipeline.dtype, self._sources, self._digests)
        module = self._store.acquire(encoder.digest, user)
        if module is None:
            reservation, measured = self._reserve(encoder.digest, encoder.memory_bytes, adapted), dict[str, int]()
            try:
                with self._construction.loading():
                    module = encoder.load(pipeline.dtype)
                module.to(pipeline.device)
                held = self._residency.add(encoder.digest, module, user, encoder.files)
                measured[encoder.digest] = held.device_bytes
            finally:
                self._residency.settle(reservation, measured)
        return module

    def _make(
        self,
        adapted: Adapted,
        step: Step,
        parts: Mapping[str, Any],
        key: Hashable,
        components: tuple[str, ...],
        user: str,
    ) -> Variant:
        modules = {role: part for role, part in parts.items() if isinstance(part, nn.Module)}
        for role, module in modules.items():
            if methods.writes_quantised(adapted.pipeline, step, role, module):
                raise AdapterMismatchError(
                    f"{step.method} does not work on a {role} that is quantised.",
                    hint="Leave the adapter beside its weights, or load it without quantization_config.",
                )
        roots = {role: self._root(module) for role, module in modules.items()}
        identity = _identity(step, roots, key)
        reservation = self._reserve(identity, methods.planned_bytes(adapted.pipeline, step, modules), adapted)
        measured: dict[str, int] = {}
        try:
            view = copy.copy(adapted.pipeline)
            with self._construction.loading():
                # No request runs meanwhile: between their turns nothing of theirs is on the components.
                self._construction.enter()
                try:
                    with Untouched(modules.values()), warnings.catch_warnings():
                        # PEFT advises against several adapters, and against losing the active one.
                        warnings.simplefilter("ignore")
                        vars(view).update({role: _twin(part) for role, part in parts.items()})
                        methods.run(view, step)
                finally:
                    self._construction.leave()
            changes = methods.changes(view, step, parts)
            fresh = Fresh(changes, modules)
            for role, module in fresh.modules.items():
                seam.watch(module)
                vars(module)[IDENTITY] = f"{role} of {hashlib.sha256(repr(key).encode()).hexdigest()}", roots.get(role)
            weights = self._enter(identity, step, fresh, user, measured)
            for module in fresh.modules.values():
                self._residency.adopt(module)
        except DenoisedError:
            raise
        except (torch.OutOfMemoryError, MemoryError):
            raise DeviceOutOfMemoryError(
                "The device ran out of memory while an adapter was loaded.",
                hint="Unload a pipeline or other adapters.",
                retry_after=1.0,
            ) from None
        except Exception as error:
            logger.debug("an adapter cannot be used", exc_info=error)
            raise AdapterMismatchError(
                f"{step.method} does not work on this {type(adapted.pipeline).__name__}: {quote(error)}.",
                hint="Check that the adapter was made for this family and size of model.",
            ) from None
        finally:
            self._residency.settle(reservation, measured)
        return Variant(
            changes, weights, components, tuple(filter(None, roots.values())), tuple(parts.values()), adapted.variant
        )

    def _enter(self, identity: str, step: Step, fresh: Fresh, user: str, measured: dict[str, int]) -> tuple[str, ...]:
        """Enters new weights into the store, as one component; those of a content that is there give way to it."""
        if not fresh.weights:
            return ()
        held = self._store.get(identity)
        if held is not None:
            fresh.replace(held.module)
        else:
            container = fresh.contained(methods.CONTAINERS[step.method])
            vars(container)["content"] = step.name
            measured[identity] = self._residency.add(identity, container, user).device_bytes
        return (identity,)

    def reserve(self, components: Mapping[str, int], *, for_call: bool = False) -> Reservation:
        """Room for components, bytes by digest; where it is short idle adapters go before idle components do."""
        if self._residency.is_short(components):
            with self._lock:
                self._shed(0)
            # Modules are in reference cycles.
            gc.collect()
        return self._residency.reserve(components, for_call=for_call)

    def _reserve(self, identity: str, size: int, adapted: Adapted) -> Reservation:
        with self._pinned(adapted):
            return self.reserve({identity: size}, for_call=True)

    @contextmanager
    def _pinned(self, adapted: Adapted) -> Iterator[None]:
        for variant in adapted.chain():
            variant.pins += 1
        try:
            yield
        finally:
            for variant in adapted.chain():
                variant.pins -= 1

    def _shed(self, keep: int) -> None:
        """Drops the longest unused of what nobody uses now, all but so many."""
        idle = [key for key, variant in self._variants.items() if variant.is_idle]
        self._drop(idle[: max(0, len(idle) - keep)])

    def _drop(self, keys: Iterable[Hashable]) -> None:
        dropped = [self._variants.pop(key) for key in keys]
        if dropped:
            kept = {digest for left in self._variants.values() for each in left.chain() for digest in each.weights}
            unused = {digest for variant in dropped for digest in variant.weights} - kept
            self._residency.forget(filter(None, map(self._store.drop, unused)))

    def _leave(self, digests: Iterable[str], user: str) -> None:
        self._residency.forget(held for digest in digests if (held := self._store.leave(digest, user)) is not None)

    def _name(self, part: Any) -> str:
        """Equal for parts that are the same component, or were made of the same one by the same steps."""
        if isinstance(part, nn.Module):
            if IDENTITY in vars(part):
                return str(vars(part)[IDENTITY][0])
            held = self._store.find(part)
            if held is not None:
                return held.digest
        return f"object:{id(part):x}"

    def _root(self, module: nn.Module) -> str | None:
        """The component that it was made of."""
        if IDENTITY in vars(module):
            root: str | None = vars(module)[IDENTITY][1]
            return root
        held = self._store.find(module)
        return held.digest if held is not None else None


def _twin(part: Any) -> Any:
    return twin(part) if isinstance(part, nn.Module) else copy.deepcopy(part)


def _identity(step: Step, roots: Mapping[str, str | None], key: Hashable) -> str:
    """A LoRA's weights are the same whatever else is loaded; other weights depend on all that was done before."""
    said = repr((step.key, sorted(roots.items()))) if step.name else repr(key)
    return f"sha256:{hashlib.sha256(said.encode()).hexdigest()}"

"""Residency: which components are on the device, and that those which are called get there.

A component has to be on the device only while its calls run. A call claims what it computes with; when that is away the
call waits, others go on, and a thread of its own brings it back, once what is worth less has left. Loads get their room
the same way. Nothing leaves in the middle of a turn of the engine: what requests do between two calls finds the weights
that it found before.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from denoised.errors import DenoisedError, InternalError, NeverFitsError, NoRoomError
from denoised_server.messages import HeldComponent, Keep, Outcome
from torch import nn

from . import absence, eviction, tensors
from .cargo import Cargo
from .components import ComponentStore, Held
from .construction import Construction
from .digests import Digests
from .eviction import Resident, Uses
from .ledger import Ledger
from .memory_counts import MemoryCounts
from .moving import Mover
from .possession import Possession
from .succession import Succession
from .tenants import Tenants
from .tiers import Bandwidths, Tier

logger = logging.getLogger(__name__)

# How often a call that found no room is looked at again when nothing else happens. Seconds.
RETRY_SECONDS = 0.05
# After so long, no other call is served before the one that has waited longest. Seconds.
PATIENCE_SECONDS = 10.0
NO_ROOM_RETRY_SECONDS = 10.0


@dataclass(slots=True, eq=False)
class Visit:
    """One request on its way from component to component."""

    pipeline: str = ""
    last: str = ""


@dataclass(slots=True, eq=False)
class Claim:
    """What a call computes with, which is to be on the device; `error` says why it never will be.

    `ready` is called once, from another thread, when it may be worth to enter. One that is urgent is of whoever has the
    turn, and waits in the middle of it; `is_again` says that the same request called the same before.
    """

    needs: tuple[Held, ...]
    ready: Callable[[], None]
    is_urgent: bool = False
    error: DenoisedError | None = None
    is_again: bool = False
    waits_since: float = 0.0
    is_released: bool = False

    @property
    def is_present(self) -> bool:
        for held in self.needs:  # noqa: SIM110 - three times per call, and all() takes twice as long
            if held.tier is not Tier.DEVICE or held.is_moving:
                return False
        return True


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room that a load was promised. What is `below` gets none yet: it begins on a lower tier."""

    number: int
    new_bytes: int
    shared_bytes: int
    below: frozenset[str]


@dataclass(frozen=True, slots=True)
class Foresight:
    """What reserving room would come to: who would leave, and the figures that it follows from, in bytes."""

    outcome: Outcome
    new_bytes: int
    free_bytes: int
    evictable_bytes: int
    budget_bytes: int
    leaving: tuple[HeldComponent, ...]


class Residency:
    """Owns where components are. Used from any thread."""

    def __init__(
        self,
        store: ComponentStore,
        ledger: Ledger,
        construction: Construction,
        device: torch.device,
        digests: Digests,
        counts: MemoryCounts,
        *,
        host_bytes: int = 0,
    ) -> None:
        self._store, self._ledger, self._construction, self._device = store, ledger, construction, device
        self._counts, self._host_bytes = counts, host_bytes
        self._bandwidths = Bandwidths()
        self._mover = Mover(device, digests, self._bandwidths, counts, self._bring_now)
        self._possession = Possession(self._may_swap, self._swap)
        self._tenants, self._succession = Tenants(), Succession()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._waiting: list[Claim] = []
        self._ahead: dict[str, Held] = {}
        self._owners: dict[int, Held] = {}
        self._needs: weakref.WeakKeyDictionary[nn.Module, tuple[Held, ...]] = weakref.WeakKeyDictionary()
        # Set by the engine: whether a running request has changed something on the module.
        self.is_changed: Callable[[nn.Module], bool] = lambda module: False
        self._is_closed = False
        absence.install()
        self._thread = threading.Thread(target=self._serve, name="residency", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        self._possession.close()

    @property
    def is_settled(self) -> bool:
        """Whether all weights are where they stay."""
        return self._possession.is_complete

    @property
    def unreclaimed_bytes(self) -> int:
        """Weights that were let go of and are still there, because something refers to them."""
        return self._mover.reclaim.unreclaimed_bytes

    @property
    def evictable_bytes(self) -> int:
        """Weights that are idle, and go when others need their room."""
        with self._lock:
            return eviction.movable_bytes(self._resident(held) for held in self._store.all() if not held.claims)

    # Calls

    def claim(self, module: nn.Module, visit: Visit, ready: Callable[[], None]) -> Claim:
        """What a call of this module needs. It stays on the device while the claim is held, unless others have waited
        long for its room.
        """
        with self._lock:
            claim = Claim(self._needed(module), ready)
            for held in claim.needs:
                held.claims += 1
            self._follow(claim, visit)
            if not claim.is_present:
                self._wait(claim)
        return claim

    def has(self, claim: Claim) -> bool:
        """Whether all of it is there. If not, the claim waits; one that was told so may find that it has left since."""
        with self._lock:
            if not claim.is_present:
                self._wait(claim)
            return claim.is_present

    def enter(self, claim: Claim) -> bool:
        """Whether all of it is there; if so, it is until `leave`. If not, the claim waits again."""
        with self._lock:
            if not claim.is_present:
                self._wait(claim)
                return False
            for held in claim.needs:
                held.running += 1
            return True

    def leave(self, claim: Claim, *, is_over: bool = True) -> None:
        """A call that entered has run; unless it is over it will again."""
        now = time.monotonic()
        with self._lock:
            for held in claim.needs:
                held.running -= 1
                held.uses.used(now, again=claim.is_again)
            if is_over:
                self.release(claim)

    def release(self, claim: Claim) -> None:
        """Nobody waits for the call any more."""
        with self._lock:
            if not claim.is_released:
                claim.is_released = True
                for held in claim.needs:
                    held.claims -= 1
                if self._waiting or self._ahead:
                    self._changed.notify_all()

    @contextmanager
    def holding(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """These are on the device and stay there. Not for the engine's thread."""
        with self._lock:
            needs = dict.fromkeys(held for module in modules for held in self._needed(module))
        claim = self._enter_now(Claim(tuple(needs), lambda: None))
        try:
            yield
        finally:
            self.leave(claim)

    def adopt(self, twin: nn.Module) -> None:
        """Has a module that uses components' weights notice when they are away."""
        with self._lock:
            self._needed(twin)

    # Loads

    def reserve(self, components: Mapping[str, int], *, for_call: bool = False) -> Reservation:
        """Promises what is new of these components, bytes by digest, and has what is idle make room for it.

        What finds no room although it could be made for a call begins on a lower tier; what is `for_call` has it made
        at once. Raises NeverFitsError for a component that is larger than the budget, and NoRoomError when what is in
        use leaves too little.
        """
        spared: set[Held] = set()
        while True:
            with self._lock:
                new = {digest: size for digest, size in components.items() if digest not in self._store}
                shared = sum(components.values()) - sum(new.values())
                self._check(new, sum(components.values()))
                room = self._ledger.free_bytes + self._idle_bytes(spared)
                fitting = _fitting(new, max(room, sum(new.values())) if for_call else room)
                short = sum(fitting.values()) - max(0, self._ledger.free_bytes)
                if short <= 0:
                    plan = self._ledger.plan(fitting)
                    below = frozenset(new.keys() - fitting.keys())
                    return Reservation(self._ledger.reserve(plan), plan.new_bytes, shared, below)
                leaving = self._choose(short, for_call=for_call, spared=spared)
                if leaving is None:
                    raise _no_room(sum(new.values()), self._ledger)
            # What cannot leave after all is not asked again.
            spared |= {held for held in leaving if not self._evict(held, "room")}

    def foresee(self, components: Mapping[str, int]) -> Foresight:
        """What reserving these components, bytes by digest, would come to. Nothing is promised and nobody leaves."""
        with self._lock:
            new = {digest: size for digest, size in components.items() if digest not in self._store}
            free, evictable, budget = max(0, self._ledger.free_bytes), self.evictable_bytes, self._ledger.budget_bytes
            largest, leaving = max(new.values(), default=0), list[HeldComponent]()
            if largest > budget:
                outcome = Outcome.NEVER_FITS
            elif largest > free + evictable:
                outcome = Outcome.NO_ROOM
            else:
                fitting = _fitting(new, free + self._idle_bytes(()))
                leaving = self._leaving(sum(fitting.values()) - free)
                outcome = Outcome.EVICTS if leaving else Outcome.FITS
                if len(fitting) < len(new):
                    outcome = Outcome.TAKES_TURNS
        return Foresight(outcome, sum(new.values()), free, evictable, budget, tuple(leaving))

    def _leaving(self, short: int) -> list[HeldComponent]:
        """Who would leave for a load that lacks so many bytes."""
        there = {held.digest: held for held in self._store.all()}
        found = eviction.choose(map(self._resident, there.values()), short, time.monotonic(), for_call=False)
        return [
            HeldComponent(each.digest, type(held.module).__name__, each.size, tuple(sorted(held.users)), held.tier)
            for each in found or ()
            if (held := there[each.digest])
        ]

    def is_short(self, components: Mapping[str, int]) -> bool:
        """Whether there is no room for them as things are."""
        new = sum(size for digest, size in components.items() if digest not in self._store)
        return new > self._ledger.free_bytes

    def settle(self, reservation: Reservation, measured: Mapping[str, int]) -> None:
        """The load is over, and has brought these components, bytes on the device by digest."""
        with self._lock:
            self._ledger.settle(reservation.number, measured)
            self._changed.notify_all()

    def add(
        self,
        digest: str,
        module: nn.Module,
        user: str,
        files: tuple[Path, ...] = (),
        *,
        below: Reservation | None = None,
    ) -> Held:
        """Enters a component that was moved to the device; one to be `below` what was reserved for its load is in the
        host's memory still, and begins on its tier.

        Raises NoRoomError for one that would have to be below but cannot.
        """
        with self._lock:
            # Some ControlNets are given layers of the denoiser that they steer: those are its own, and move with it.
            theirs = [tensor for tensor in tensors.of(module) if id(tensor) in self._owners]
        cargo = Cargo(module, self._device, without=theirs)
        if below is not None:
            cargo.own()
        elif self._device.type == "cpu":
            cargo.own_others()
        size = cargo.size + cargo.other_bytes
        held = Held(digest, module, size, cargo, Uses(time.monotonic()), frozenset({user}), files)
        held.shells.add(module)
        if below is not None:
            to_host = self._make_host_room(held)
            if self._mover.can_leave(held, to_host=to_host):
                self._mover.prepare(held, to_host=to_host)
                self._mover.leave(held, to_host=to_host)()
            else:
                self._make_room(held, below)
            for tensor in tensors.of(module):
                if tensor.device != self._device:
                    tensor.data = tensor.data.to(self._device)
        with self._lock:
            for tensor in tensors.of(module):
                self._owners.setdefault(id(tensor), held)
            self._store.add(held)
        if self._device.type == "cpu" and below is None and cargo.slots:
            self._possession.take(held)
        return held

    def _may_swap(self, held: Held) -> bool:
        """Whether nobody has a component's weights in their hands, or changes on them."""
        # Between two turns of the engine, as when it leaves.
        with self._construction.turn(), self._lock:
            return self._is_at_rest(held)

    def _swap(self, held: Held, buffer: torch.Tensor) -> bool:
        """Gives a component its weights in a buffer, unless it has left meanwhile; False to try again."""
        with self._construction.turn(), self._lock:
            # During the copy it may have left, and left stand-ins for weights; what came back is the process's own.
            if self._store.get(held.digest) is not held or held.tier is not Tier.DEVICE or held.cargo.is_packed:
                return True
            if not self._is_at_rest(held):
                return False
            held.cargo.come_back(buffer)
            return True

    def _is_at_rest(self, held: Held) -> bool:
        return not (held.running or held.is_moving or any(self.is_changed(shell) for shell in list(held.shells)))

    def _make_room(self, held: Held, reservation: Reservation) -> None:
        """Promises its load more, and has what is idle leave for it."""
        spared: set[Held] = set()
        while True:
            with self._lock:
                short = held.weight_bytes - self._ledger.free_bytes
                if short <= 0:
                    self._ledger.extend(reservation.number, held.weight_bytes)
                    return
                leaving = self._choose(short, for_call=True, spared=spared)
                if leaving is None:
                    raise _no_room(held.weight_bytes, self._ledger)
            spared |= {other for other in leaving if not self._evict(other, "room")}

    def forget(self, gone: Iterable[Held]) -> int:
        """Components that the store has no more; returns their bytes on the device."""
        freed = 0
        for held in gone:
            self._possession.drop(held)
            with self._lock:
                self._changed.wait_for(lambda held=held: not held.is_moving)  # type: ignore[misc]
                for tensor in tensors.of(held.module):
                    if self._owners.get(id(tensor)) is held:
                        del self._owners[id(tensor)]
                for shell in held.shells:
                    self._needs.pop(shell, None)
                self._ahead.pop(held.digest, None)
                held.host = None
                freed += self._ledger.release(held.digest)
                self._changed.notify_all()
        return freed

    def keep(self, pipeline: str, keep: Keep) -> None:
        """Says how a pipeline's components are kept; pinned ones are brought. Raises NoRoomError, changing nothing."""
        with self._lock:
            mine = [held for held in self._store.all() if pipeline in held.users]
            pinned = [held for held in self._store.all() if held in mine or self._tenants.pin(held.users)]
            if keep.pinned and sum(held.weight_bytes for held in pinned) > self._ledger.budget_bytes:
                raise NoRoomError(
                    "What is pinned would take more than the device's budget.",
                    hint="Unpin or unload another pipeline, or load this one without pinning it.",
                    retry_after=NO_ROOM_RETRY_SECONDS,
                )
            self._tenants.keep(pipeline, keep, time.monotonic())
            if keep.pinned:
                self._ahead |= {held.digest: held for held in mine if held.tier is not Tier.DEVICE}
            self._changed.notify_all()

    def begin(self, pipeline: str) -> None:
        """A generation of the pipeline begins."""
        with self._lock:
            self._tenants.begin(pipeline, time.monotonic())

    def end(self, pipeline: str) -> None:
        with self._lock:
            self._tenants.end(pipeline, time.monotonic())
            self._changed.notify_all()

    def let_go(self, pipeline: str) -> None:
        """The pipeline is gone."""
        with self._lock:
            self._tenants.leave(pipeline)

    # Out of memory

    def evict_idle(self, needed_bytes: int, reason: str = "out_of_memory") -> int:
        """On the engine's thread: has so many bytes of what is idle leave, or all; returns the bytes that left."""
        with self._lock:
            idle = [held for held in self._store.all() if self._is_movable(held) and not held.claims]
            enough = self._choose(needed_bytes, for_call=True, among=idle)
            leaving = enough if enough is not None else idle
            for held in leaving:
                held.is_moving = True
        return self._evict_all(leaving, reason)

    def offload(self, keep: nn.Module) -> int:
        """On the engine's thread: has everything leave but this component; returns the bytes that left."""
        with self._lock:
            kept = self._needed(keep)
            leaving = [held for held in self._store.all() if held not in kept and self._is_movable(held)]
            for held in leaving:
                held.is_moving = True
        return self._evict_all(leaving, "out_of_memory")

    # What is asked of it

    def _needed(self, module: nn.Module) -> tuple[Held, ...]:
        needs = self._needs.get(module)
        if needs is None:
            found = (self._owners.get(id(tensor)) for tensor in tensors.of(module))
            needs = self._needs[module] = tuple(dict.fromkeys(held for held in found if held is not None))
            for held in needs:
                held.shells.add(module)
        return needs

    def _wait(self, claim: Claim) -> None:
        if claim not in self._waiting:
            claim.waits_since = time.monotonic()
            self._waiting.append(claim)
            self._changed.notify_all()

    def _follow(self, claim: Claim, visit: Visit) -> None:
        """Learns which component follows on which, and has the one that will likely follow come."""
        digest = claim.needs[0].digest if claim.needs else ""
        claim.is_again = digest == visit.last
        if not digest or claim.is_again:
            return
        if visit.last:
            self._succession.note(visit.pipeline, visit.last, digest)
        visit.last = digest
        following = self._store.get(self._succession.after(visit.pipeline, digest) or "")
        if following is not None and following.tier is not Tier.DEVICE:
            self._ahead[following.digest] = following
            self._changed.notify_all()

    def _bring_now(self, held: Held) -> None:
        """Returns when the component is there, for whoever uses its weights without a call."""
        self.leave(self._enter_now(Claim((held,), lambda: None, is_urgent=self._construction.is_mine)))

    def _enter_now(self, claim: Claim) -> Claim:
        """Waits until the claim has entered. Raises what keeps it from ever doing so."""
        with self._lock:
            for held in claim.needs:
                held.claims += 1
        while not self.enter(claim):
            if claim.error is not None or self._is_closed:
                self.release(claim)
                raise claim.error or InternalError("The worker is closing.")
            # The thread that brings may be waiting for this very turn to end.
            if not (claim.is_urgent and any(self._bring(held, claim) for held in claim.needs)):
                self._wait_for(claim)
        return claim

    def _wait_for(self, claim: Claim) -> None:
        """Returns when the claim may enter or never will; for an urgent one also when another try is due."""
        with self._lock:
            self._changed.wait_for(
                lambda: claim.is_present or claim.error is not None or self._is_closed,
                RETRY_SECONDS if claim.is_urgent else None,
            )

    def _check(self, new: Mapping[str, int], total: int) -> None:
        """Raises when one of these components could not even come for its calls."""
        budget = self._ledger.budget_bytes
        movable = self.evictable_bytes
        free = max(0, self._ledger.free_bytes)
        largest = max(new.values(), default=0)
        figures = {"free": free, "evictable": movable, "budget": budget}
        if largest > budget:
            raise NeverFitsError(
                f"The weights take {total:,} bytes, {largest:,} of them in one component, and the device's budget is "
                f"{budget:,}.",
                hint="Load with a smaller dtype, or give the daemon a larger memory_budget.",
                metadata={f"{name}_bytes": str(size) for name, size in ({"needed": total} | figures).items()},
            )
        if largest > free + movable:
            raise _no_room(largest, self._ledger, movable)

    # Who leaves

    def _is_movable(self, held: Held) -> bool:
        return (
            held.tier is Tier.DEVICE
            and not (held.running or held.is_moving or self._tenants.pin(held.users))
            # While it is still being loaded, its bytes are its load's.
            and held.digest in self._ledger
            and self._has_below(held)
        )

    def _resident(self, held: Held) -> Resident:
        below = Tier.HOST if held.host is not None or self._host_bytes > 0 else Tier.DISK
        return Resident(
            held.digest,
            held.cargo.size if held.tier is Tier.DEVICE else 0,
            self._bandwidths.seconds(below, held.cargo.size),
            len(held.users),
            held.uses,
            is_wanted=held.claims > 0,
            is_fixed=not self._is_movable(held),
        )

    def _idle_bytes(self, spared: Collection[Held]) -> int:
        """What leaves when a load wants its room."""
        now = time.monotonic()
        residents = [self._resident(held) for held in self._store.all() if held not in spared]
        return eviction.movable_bytes(each for each in residents if not each.is_wanted and not each.uses.is_fresh(now))

    def _choose(
        self,
        needed_bytes: int,
        *,
        for_call: bool,
        among: Iterable[Held] | None = None,
        spared: Collection[Held] = (),
    ) -> list[Held] | None:
        """Who is to leave, marked as moving."""
        there = {held.digest: held for held in (self._store.all() if among is None else among) if held not in spared}
        found = eviction.choose(map(self._resident, there.values()), needed_bytes, time.monotonic(), for_call=for_call)
        if found is None:
            return None
        for resident in found:
            there[resident.digest].is_moving = True
        return [there[resident.digest] for resident in found]

    def _evict_all(self, leaving: Sequence[Held], reason: str) -> int:
        """Has components that are marked as moving leave; returns the bytes that left."""
        return sum(self._evict(held, reason) for held in leaving)

    def _evict(self, held: Held, reason: str) -> int:
        before, finish = held.device_bytes, None
        try:
            to_host = self._make_host_room(held)
            if self._mover.can_leave(held, to_host=to_host):
                self._mover.prepare(held, to_host=to_host)
                # Between two turns of the engine no request has changes on its components, or weights in its hands.
                with nullcontext() if self._construction.is_mine else self._construction.turn():
                    if not any(self.is_changed(shell) for shell in list(held.shells)):
                        finish = self._mover.leave(held, to_host=to_host)
                        self._book(held)
            if finish is not None:
                age = time.monotonic() - held.uses.last
                self._counts.evicted(reason, Tier.DEVICE, age)
                logger.info("%s left for %s (%s), unused for %.1f s", _name(held), held.tier, reason, age)
                finish()
        except Exception:
            # It stays, and nobody who waits for others is kept waiting by it.
            logger.exception("%s could not leave", _name(held))
            held.can_reread = False
        finally:
            with self._lock:
                held.is_moving = False
                self._changed.notify_all()
        return before - held.device_bytes

    def _book(self, held: Held) -> None:
        with self._lock:
            if self._store.get(held.digest) is held:
                self._ledger.resize(held.digest, held.device_bytes)

    def _make_host_room(self, held: Held) -> bool:
        """Whether the host's memory takes the component, if others that are worth less leave it."""
        size = held.cargo.buffer_bytes
        with self._lock:
            if held.host is not None:
                return True
            copies = [other for other in self._store.all() if other.host is not None and not other.is_moving]
            free = self._host_bytes - sum(other.cargo.buffer_bytes for other in copies)
            now = time.monotonic()
            # Copies of what is on the device cost nothing to drop.
            copies.sort(key=lambda other: (other.tier is Tier.HOST, other.uses.rate(now)))
            for other in copies:
                if size <= free or size > self._host_bytes:
                    break
                if other.can_reread:
                    free += other.cargo.buffer_bytes
                    if other.tier is Tier.HOST:
                        self._counts.evicted("room", Tier.HOST, now - other.uses.last)
                    self._mover.drop_copy(other)
            return size <= free

    # The thread that brings

    def _serve(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while True:
            with self._lock:
                if self._is_closed:
                    return
            try:
                is_progress = self._serve_calls() or self._serve_ahead() or self._serve_idle()
            except Exception:
                # Calls would wait for ever.
                logger.exception("bringing components failed in a way it should not")
                is_progress = False
            if not is_progress:
                with self._lock:
                    if not self._is_closed:
                        self._changed.wait(self._pause())

    def _pause(self) -> float | None:
        """How long nothing has to be done unless something happens."""
        if self._waiting:
            return RETRY_SECONDS
        movable = [held for held in self._store.all() if held.tier is Tier.DEVICE and not self._stays(held)]
        due = min((self._tenants.idle_at(held.users) for held in movable), default=math.inf)
        return max(RETRY_SECONDS, due - time.monotonic()) if due < math.inf else None

    def _serve_calls(self) -> bool:
        """Brings one component that calls wait for; says whether something was done."""
        with self._lock:
            self._waiting = [claim for claim in self._waiting if not (claim.is_released or claim.error)]
            present = [claim for claim in self._waiting if claim.is_present]
            for claim in present:
                self._waiting.remove(claim)
                claim.ready()
            if present:
                self._changed.notify_all()
                return True
            waiting = sorted(self._waiting, key=lambda claim: not claim.is_urgent)
        for claim in waiting:
            missing = [held for held in claim.needs if held.tier is not Tier.DEVICE and not held.is_moving]
            if missing and self._bring(missing[0], claim):
                return True
            if time.monotonic() - claim.waits_since > PATIENCE_SECONDS:
                break
        return False

    def _serve_ahead(self) -> bool:
        with self._lock:
            if self._waiting:
                return False
            self._ahead = {digest: held for digest, held in self._ahead.items() if held.tier is not Tier.DEVICE}
            ahead = [held for held in self._ahead.values() if not held.is_moving]
        return any(self._bring(held, None) for held in ahead)

    def _serve_idle(self) -> bool:
        """Has what was idle for longer than its keep_alive leave."""
        now = time.monotonic()
        with self._lock:
            leaving = [
                held
                for held in self._store.all()
                if self._is_movable(held) and not held.claims and self._tenants.idle_at(held.users) <= now
            ]
            for held in leaving:
                held.is_moving = True
        return bool(self._evict_all(leaving, "idle"))

    def _bring(self, held: Held, claim: Claim | None) -> bool:
        """Makes room for a component and brings it; without a claim only idle ones leave. False when there is none."""
        needs = claim.needs if claim is not None else (held,)
        spared: set[Held] = set(needs)
        is_urgent = claim is not None and claim.is_urgent
        while True:
            with self._lock:
                if held.is_moving or held.tier is Tier.DEVICE:
                    return False
                if self._store.get(held.digest) is not held:
                    self._fail(held, InternalError("A component that is used was unloaded."))
                    return False
                short = held.cargo.size - self._ledger.free_bytes
                leaving = self._choose(short, for_call=claim is not None, spared=spared) if short > 0 else []
                if leaving is None and not is_urgent:
                    if (never := self._why_never(needs)) is not None:
                        self._fail(held, never)
                    return False
                if not leaving:
                    # While the engine waits in the middle of a turn nothing would ever make room: it gets more.
                    held.is_moving = True
                    self._ledger.resize(held.digest, held.weight_bytes)
                    break
            spared |= {other for other in leaving if not self._evict(other, "room")}
        return self._come(held)

    def _come(self, held: Held) -> bool:
        error: DenoisedError | None = None
        try:
            self._mover.come(held)
        except DenoisedError as raised:
            error = raised
        except Exception as raised:
            logger.exception("a component could not be brought back")
            error = InternalError(f"Bringing weights back failed with {type(raised).__name__}.")
        with self._lock:
            held.uses.came(time.monotonic())
            self._book(held)
            held.is_moving = False
            if error is not None:
                self._fail(held, error)
            self._changed.notify_all()
        return True

    def _fail(self, held: Held, error: DenoisedError) -> None:
        """Tells whoever waits for the component that it does not come."""
        self._ahead.pop(held.digest, None)
        for claim in self._waiting:
            if held in claim.needs and claim.error is None:
                # One each: whoever raises it adds a traceback.
                claim.error = copy.copy(error)
                claim.ready()
        self._changed.notify_all()

    def _why_never(self, needs: Sequence[Held]) -> NoRoomError | None:
        """An error when what stays for ever leaves no room for what a call needs."""
        needed = sum(held.weight_bytes for held in needs)
        stays = sum(
            other.device_bytes if self._stays(other) else other.weight_bytes - other.cargo.size
            for other in self._store.all()
            if other not in needs
        )
        if needed + stays <= self._ledger.budget_bytes:
            return None
        return NoRoomError(
            f"What the call needs takes {needed:,} bytes and has left the device, and what has to stay there leaves it "
            f"{max(0, self._ledger.budget_bytes - stays):,}.",
            hint="Unpin or unload another pipeline.",
            retry_after=NO_ROOM_RETRY_SECONDS,
        )

    def _stays(self, held: Held) -> bool:
        return held.tier is Tier.DEVICE and (not self._has_below(held) or self._tenants.pin(held.users))

    def _has_below(self, held: Held) -> bool:
        """Whether there is a place to bring it back from, as far as that is known."""
        if not held.cargo.slots or held.can_reread:
            return bool(held.cargo.slots)
        # What is only there takes the host's memory for as long as it is used.
        only_there = (other for other in self._store.all() if other.tier is Tier.HOST and not other.can_reread)
        return held.cargo.buffer_bytes + sum(other.cargo.buffer_bytes for other in only_there) <= self._host_bytes


def _fitting(new: Mapping[str, int], room: int) -> dict[str, int]:
    """What of it has so much room, in its order."""
    fitting = dict[str, int]()
    for digest, size in new.items():
        if sum(fitting.values()) + size <= room:
            fitting[digest] = size
    return fitting


def _no_room(needed: int, ledger: Ledger, evictable: int = 0) -> NoRoomError:
    free = max(0, ledger.free_bytes)
    figures = {"needed": needed, "free": free, "evictable": evictable, "budget": ledger.budget_bytes}
    return NoRoomError(
        f"{needed:,} bytes are needed, {free:,} are free, and what is idle holds {evictable:,} more.",
        hint="Try again when running generations have ended, or unload a pipeline that is not needed.",
        retry_after=NO_ROOM_RETRY_SECONDS,
        metadata={f"{name}_bytes": str(size) for name, size in figures.items()},
    )


def _name(held: Held) -> str:
    return f"{type(held.module).__name__} {held.digest[:19]}"

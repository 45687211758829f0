"""Room for components: that those who wait for it never wait for each other, and that it is made for calls."""

from __future__ import annotations

import gc
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from denoised.errors import NoRoomError
from denoised_server.messages import Keep
from denoised_server.worker.components import ComponentStore, Held
from denoised_server.worker.construction import Construction
from denoised_server.worker.digests import Digests
from denoised_server.worker.inputs import Inputs
from denoised_server.worker.ladder import Rung
from denoised_server.worker.ledger import Ledger
from denoised_server.worker.memory_counts import MemoryCounts
from denoised_server.worker.recovery import Recovery
from denoised_server.worker.residency import Claim, Residency, Visit
from denoised_server.worker.seam import Method
from denoised_server.worker.tiers import Tier
from denoised_server.worker.trial import Trial, Tried
from safetensors.torch import save_file
from torch import nn

from tests.memory_limit import MIB, limited

CPU = torch.device("cpu")
# Of each component's weights.
SIZE = 32 * MIB


def linear() -> nn.Linear:
    return nn.Linear(1024, SIZE // 4096, bias=False, device="meta").to_empty(device="cpu")


class House:
    """Components of one size each, in a real Residency. Those without files cannot be read again."""

    def __init__(self, folder: Path, *, room: float, host: float = 0) -> None:
        self.folder, self.counts = folder, MemoryCounts()
        self.store, self.construction = ComponentStore(), Construction()
        self.ledger = Ledger(int(room * SIZE))
        self.residency = Residency(
            self.store,
            self.ledger,
            self.construction,
            CPU,
            Digests(folder / "hub"),
            self.counts,
            host_bytes=int(host * SIZE),
        )

    def add(self, name: str, *, in_files: bool = True) -> Held:
        module = linear()
        with torch.no_grad():
            module.weight.fill_(float(len(name)))
        files = (self.folder / f"{name}.safetensors",)
        if in_files:
            save_file({"weight": module.weight.detach()}, files[0])
        digest = hashlib.sha256(name.encode()).hexdigest()
        reservation = self.residency.reserve({digest: SIZE}, for_call=True)
        held = self.residency.add(digest, module, f"pipelines/{name}", files if in_files else ())
        self.residency.settle(reservation, {digest: held.device_bytes})
        with self.residency.holding([module]):
            """Its first use."""
        while not self.residency.is_settled:
            # Tests change weights, which may not happen during the copy out of the files.
            time.sleep(0.001)
        return held

    def recovered(self, needed: int) -> Tried:
        """A call of somebody else's that takes so many bytes, where there is a little less."""
        identity = nn.Identity()

        def compute() -> float:
            return float(torch.ones(needed, dtype=torch.uint8)[-1])

        method = Method(identity, "forward", compute, [])
        gc.collect()
        with limited(needed - SIZE // 2), self.construction.turn():
            return Recovery(CPU, counts=self.counts, room=self.residency).run(
                Trial(method, 1, 1, Inputs([]), True, compute)
            )


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., House]]:
    houses: list[House] = []

    def built(room: float, host: float = 0) -> House:
        houses.append(House(tmp_path, room=room, host=host))
        return houses[-1]

    yield built
    for house in houses:
        house.residency.close()


def until(predicate: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not predicate():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def weight_of(held: Held) -> float:
    weight: torch.Tensor = held.module.weight  # type: ignore[assignment]
    return float(weight.detach()[-1, -1])


def claimed(house: House, *needed: Held) -> Claim:
    """A call that waits for them."""
    owner = nn.ModuleList([each.module for each in needed])
    return house.residency.claim(owner, Visit(), lambda: None)


def test_who_has_the_turn_gets_weights_also_while_the_thread_that_brings_waits_for_that_turn(
    build: Callable[..., House],
) -> None:
    house = build(room=1.5)
    away = house.add("a")
    there = house.add("bb")
    assert (away.tier, there.tier) == (Tier.DISK, Tier.DEVICE)
    seen: list[float] = []

    def use() -> None:
        with house.construction.turn():
            waiting = claimed(house, away)
            # The thread that brings has chosen who leaves for the call, and wants the turn for it.
            until(lambda: there.is_moving)
            seen.append(weight_of(away))
            house.residency.release(waiting)

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(20)
    assert seen == [1.0]
    # The other one has left since, which made up for what was brought beyond the budget.
    until(lambda: there.tier is Tier.DISK and house.ledger.free_bytes >= 0)


def test_a_call_whose_weights_leave_again_before_it_runs_waits_for_them_again(build: Callable[..., House]) -> None:
    house = build(room=4)
    wanted = house.add("a")
    with house.construction.turn():
        house.residency.offload(nn.Identity())
        waiting = claimed(house, wanted)
        until(lambda: waiting.is_present)
        # It was told that they are there; before its turn a call that ran out of memory has them leave.
        house.residency.offload(nn.Identity())
        assert not house.residency.has(waiting)
        until(lambda: house.residency.has(waiting))
    house.residency.release(waiting)


def test_a_call_is_told_when_what_cannot_leave_keeps_it_out_for_ever(build: Callable[..., House]) -> None:
    # The host's memory would take half a component: with none at all, this was noticed.
    house = build(room=1.5, host=0.5)
    house.add("a")
    house.residency.keep("pipelines/a", Keep(keep_alive=0.0))
    until(lambda: [held.tier for held in house.store.all()] == [Tier.DISK])
    (away,) = house.store.all()
    house.residency.keep("pipelines/a", Keep())
    house.add("bb", in_files=False)
    waiting = claimed(house, away)
    until(lambda: waiting.error is not None)
    assert isinstance(waiting.error, NoRoomError)
    assert house.residency.evictable_bytes == 0


def test_a_call_is_told_when_what_it_needs_at_once_is_more_than_the_device_takes(build: Callable[..., House]) -> None:
    house = build(room=1.5)
    waiting = claimed(house, house.add("a"), house.add("bb"))
    until(lambda: waiting.error is not None)
    assert isinstance(waiting.error, NoRoomError)


def test_what_a_call_needs_does_not_leave_for_the_rest_of_what_it_needs(build: Callable[..., House]) -> None:
    house = build(room=2.5)
    first, second = house.add("a"), house.add("bb")
    house.add("ccc")
    with house.residency.holding([first.module, second.module]):
        assert (weight_of(first), weight_of(second)) == (1.0, 2.0)


def test_a_component_that_cannot_begin_below_gets_room_or_is_refused(build: Callable[..., House]) -> None:
    house = build(room=1.5)
    idle = house.add("a")
    reservation = house.residency.reserve({"new": 0})
    late = linear()
    house.residency.add("new", late, "pipelines/late", below=reservation)
    assert idle.tier is Tier.DISK
    assert house.ledger.reserved_bytes == SIZE, "nobody else takes what was made free for it"
    house.residency.settle(reservation, {"new": SIZE})
    assert house.ledger.free_bytes == SIZE // 2
    # There is nobody any more who could leave.
    reservation = house.residency.reserve({"one more": 0})
    with pytest.raises(NoRoomError):
        house.residency.add("one more", linear(), "pipelines/late", below=reservation)
    house.residency.settle(reservation, {})
    assert house.ledger.weight_bytes == SIZE


def test_what_cannot_leave_after_all_is_not_taken_for_room(build: Callable[..., House]) -> None:
    house = build(room=1.5)
    house.add("a")
    # Its weights are not those in its file any more, which shows when it is to leave.
    (held,) = house.store.all()
    weight: torch.Tensor = held.module.weight  # type: ignore[assignment]
    weight.data += 1.0
    reservation = house.residency.reserve({"new": 0})
    with pytest.raises(NoRoomError):
        house.residency.add("new", linear(), "pipelines/late", below=reservation)
    house.residency.settle(reservation, {})
    assert house.ledger.weight_bytes == SIZE


def test_idle_weights_leave_for_a_call_that_runs_out_of_memory_and_come_back(build: Callable[..., House]) -> None:
    house = build(room=4)
    idle = house.add("a")
    tried = house.recovered(needed=2 * SIZE)
    assert (tried.error, tried.value, tried.helped) == (None, 1.0, Rung.EVICT_IDLE)
    assert idle.tier is Tier.DISK
    assert house.counts.evictions["out_of_memory"]["device"] == 1
    assert house.counts.recoveries["evict_idle"] == 1
    with house.residency.holding([idle.module]):
        assert weight_of(idle) == 1.0


def test_weights_that_other_calls_wait_for_leave_only_when_nothing_else_helps(build: Callable[..., House]) -> None:
    house = build(room=4)
    wanted = house.add("a")
    waiting = claimed(house, wanted)
    tried = house.recovered(needed=2 * SIZE)
    assert (tried.error, tried.value, tried.helped) == (None, 1.0, Rung.OFFLOAD)
    assert house.counts.recoveries["offload"] == 1
    # And are brought back for them.
    until(lambda: house.residency.enter(waiting))
    assert weight_of(wanted) == 1.0
    house.residency.leave(waiting)

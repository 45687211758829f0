"""Bytes promised and held."""

from __future__ import annotations

import pytest
from denoised.errors import NeverFitsError, NoRoomError
from denoised_server.worker.ledger import Ledger
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule


def holding(budget: int, components: dict[str, int], working_set: int = 0) -> Ledger:
    ledger = Ledger(budget, working_set)
    ledger.settle(ledger.reserve(ledger.plan(components)), components)
    return ledger


def test_what_is_held_costs_nothing_again() -> None:
    plan = holding(100, {"unet": 60}).plan({"unet": 60, "vae": 30})
    assert (plan.new_bytes, plan.shared_bytes) == (30, 60)


def test_weights_larger_than_the_budget_never_fit() -> None:
    with pytest.raises(NeverFitsError) as caught:
        holding(100, {"unet": 60}).plan({"unet": 60, "vae": 41})
    assert caught.value.retry_after is None
    figures = {"needed_bytes": "101", "free_bytes": "40", "evictable_bytes": "0", "budget_bytes": "100"}
    assert caught.value.metadata == figures


def test_weights_that_fit_only_an_empty_device_find_no_room_for_now() -> None:
    ledger = Ledger(100)
    ledger.reserve(ledger.plan({"unet": 60}))
    with pytest.raises(NoRoomError) as caught:
        ledger.plan({"other": 50}, evictable_bytes=5)
    assert caught.value.retry_after is not None
    figures = {"needed_bytes": "50", "free_bytes": "40", "evictable_bytes": "5", "budget_bytes": "100"}
    assert caught.value.metadata == figures


def test_a_plan_says_how_much_has_to_go_first() -> None:
    ledger = holding(100, {"a": 30, "b": 30, "c": 30})
    assert ledger.plan({"new": 10}).lacking_bytes == 0
    assert ledger.plan({"new": 50}, evictable_bytes=60).lacking_bytes == 40
    assert ledger.plan({"a": 30, "new": 50}, evictable_bytes=60).lacking_bytes == 40


def test_what_has_to_go_is_gone_before_its_room_is_promised() -> None:
    ledger = holding(100, {"idle": 80})
    plan = ledger.plan({"new": 50}, evictable_bytes=80)
    with pytest.raises(NoRoomError):
        ledger.reserve(plan)
    ledger.release("idle")
    ledger.settle(ledger.reserve(plan), {"new": 50})
    assert ledger.free_bytes == 50


def test_a_failed_load_leaves_the_ledger_as_it_was() -> None:
    ledger = Ledger(100)
    ledger.cancel(ledger.reserve(ledger.plan({"unet": 60})))
    assert (ledger.free_bytes, ledger.reserved_bytes, ledger.weight_bytes) == (100, 0, 0)


def test_what_has_left_the_device_is_free_for_others_and_counts_again_when_it_is_back() -> None:
    ledger = holding(100, {"unet": 60})
    ledger.resize("unet", 1)
    assert (ledger.weight_bytes, ledger.free_bytes) == (1, 99)
    ledger.resize("unet", 60)
    assert ledger.free_bytes == 40
    assert ledger.release("unet") == 60


def test_calls_borrow_room_that_weights_do_not_use_and_give_it_back() -> None:
    ledger = holding(100, {"unet": 60}, working_set=20)
    assert ledger.working_room_bytes == 60
    claim = ledger.claim(50)
    assert (ledger.lent_bytes, ledger.free_bytes, ledger.working_room_bytes) == (30, 10, 10)
    with pytest.raises(NoRoomError):
        ledger.plan({"vae": 30})
    with pytest.raises(NoRoomError) as caught:
        ledger.claim(11)
    assert caught.value.metadata["free_bytes"] == "10"
    ledger.give_back(claim)
    assert ledger.plan({"vae": 30}).new_bytes == 30


def test_weights_never_take_the_working_set() -> None:
    ledger = holding(100, {"unet": 100}, working_set=20)
    assert (ledger.free_bytes, ledger.working_room_bytes) == (0, 20)
    ledger.claim(20)
    assert ledger.free_bytes == 0


SIZES = st.integers(0, 100)
DIGESTS = st.sampled_from("abcde")


class Life(RuleBasedStateMachine):
    """Loads that succeed, fail and are let go of, evictions, calls and crashes, in any order."""

    @initialize(budget=st.integers(0, 200), working_set=st.integers(0, 100))
    def start(self, budget: int, working_set: int) -> None:
        self.budget, self.working_set = budget, working_set
        self.crash()

    @rule()
    def crash(self) -> None:
        """A worker that starts again begins with empty books."""
        self.ledger = Ledger(self.budget, self.working_set)
        self.loading: dict[int, dict[str, int]] = {}
        self.held: dict[str, int] = {}
        self.away: dict[str, int] = {}
        self.claims: dict[int, int] = {}

    @rule(components=st.dictionaries(DIGESTS, SIZES, max_size=3), may_go=st.lists(DIGESTS, unique=True))
    def load(self, components: dict[str, int], may_go: list[str]) -> None:
        components = {digest: self.held.get(digest, size) for digest, size in components.items()}
        idle = {digest: self.held[digest] for digest in may_go if digest in self.held and digest not in components}
        new = sum(size for digest, size in components.items() if digest not in self.held)
        spare, free = sum(idle.values()), self.ledger.free_bytes
        fits_empty = sum(components.values()) <= self.budget
        if not fits_empty or new > free + spare:
            with pytest.raises(NoRoomError if fits_empty else NeverFitsError):
                self.ledger.plan(components, spare)
            return
        plan = self.ledger.plan(components, spare)
        assert plan.lacking_bytes == max(0, new - free)
        if plan.lacking_bytes:
            with pytest.raises(NoRoomError):
                self.ledger.reserve(plan)
        while self.ledger.free_bytes < new:
            digest, size = idle.popitem()
            self.ledger.resize(digest, 0)
            self.held[digest], self.away[digest] = 0, size
        self.loading[self.ledger.reserve(plan)] = dict(plan.new)

    @precondition(lambda self: self.loading)
    @rule(digest=DIGESTS, size=SIZES)
    def take_more(self, digest: str, size: int) -> None:
        """What was to begin on a lower tier stays."""
        number, components = next(iter(self.loading.items()))
        if size > self.ledger.free_bytes:
            with pytest.raises(NoRoomError):
                self.ledger.extend(number, size)
        elif digest not in components and digest not in self.held:
            self.ledger.extend(number, size)
            components[digest] = size

    @precondition(lambda self: self.loading)
    @rule()
    def succeed(self) -> None:
        number, components = self.loading.popitem()
        self.ledger.settle(number, components)
        self.held |= components
        self.away = {digest: size for digest, size in self.away.items() if digest not in components}

    @precondition(lambda self: self.loading)
    @rule()
    def fail(self) -> None:
        self.ledger.cancel(self.loading.popitem()[0])

    @rule(digest=DIGESTS)
    def release(self, digest: str) -> None:
        self.away.pop(digest, None)
        assert self.ledger.release(digest) == self.held.pop(digest, 0)

    @precondition(lambda self: self.away)
    @rule()
    def come_back(self) -> None:
        digest, size = self.away.popitem()
        if digest in self.held and size <= self.ledger.free_bytes:
            self.ledger.resize(digest, size)
            self.held[digest] = size

    @rule(size=SIZES)
    def call(self, size: int) -> None:
        if size > self.ledger.working_room_bytes:
            with pytest.raises(NoRoomError):
                self.ledger.claim(size)
            return
        self.claims[self.ledger.claim(size)] = size

    @precondition(lambda self: self.claims)
    @rule()
    def end_call(self) -> None:
        self.ledger.give_back(self.claims.popitem()[0])

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "ledger"):
            ledger = self.ledger
            assert ledger.weight_bytes == sum(self.held.values())
            assert ledger.reserved_bytes == sum(sum(each.values()) for each in self.loading.values())
            assert ledger.claimed_bytes == sum(self.claims.values())
            taken = ledger.weight_bytes + ledger.reserved_bytes + ledger.lent_bytes
            assert taken + ledger.free_bytes == self.budget
            # What is there and what was promised fits, weights and calls together.
            assert ledger.free_bytes >= 0
            assert ledger.weight_bytes + ledger.reserved_bytes + ledger.claimed_bytes <= self.budget + self.working_set
            assert ledger.working_room_bytes >= 0


TestLife = Life.TestCase

"""Bytes promised and held."""

from __future__ import annotations

import pytest
from denoised.errors import NeverFitsError, NoRoomError
from denoised_server.worker.ledger import Ledger
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule


def test_what_is_held_costs_nothing_again() -> None:
    ledger = Ledger(100)
    ledger.settle(ledger.reserve(ledger.plan({"unet": 60})), {"unet": 60})
    plan = ledger.plan({"unet": 60, "vae": 30})
    assert (plan.new_bytes, plan.shared_bytes) == (30, 60)


def test_weights_larger_than_the_budget_never_fit() -> None:
    with pytest.raises(NeverFitsError) as caught:
        Ledger(100).plan({"unet": 101})
    assert caught.value.metadata["budget_bytes"] == "100"


def test_weights_that_fit_only_an_empty_device_find_no_room_for_now() -> None:
    ledger = Ledger(100)
    ledger.reserve(ledger.plan({"unet": 60}))
    with pytest.raises(NoRoomError) as caught:
        ledger.plan({"other": 50})
    assert caught.value.retry_after is not None
    assert caught.value.metadata["free_bytes"] == "40"


def test_a_failed_load_leaves_the_ledger_as_it_was() -> None:
    ledger = Ledger(100)
    ledger.cancel(ledger.reserve(ledger.plan({"unet": 60})))
    assert (ledger.free_bytes, ledger.reserved_bytes, ledger.weight_bytes) == (100, 0, 0)


def test_what_has_left_the_device_is_free_for_others_and_counts_again_when_it_is_back() -> None:
    ledger = Ledger(100)
    ledger.settle(ledger.reserve(ledger.plan({"unet": 60})), {"unet": 60})
    ledger.resize("unet", 1)
    assert (ledger.weight_bytes, ledger.free_bytes) == (1, 99)
    ledger.resize("unet", 60)
    assert ledger.free_bytes == 40
    assert ledger.release("unet") == 60


class Life(RuleBasedStateMachine):
    """Loads that succeed, fail and are let go of, in any order."""

    @initialize(budget=st.integers(0, 200))
    def start(self, budget: int) -> None:
        self.ledger, self.budget = Ledger(budget), budget
        self.loading: dict[int, dict[str, int]] = {}
        self.held: dict[str, int] = {}

    @rule(components=st.dictionaries(st.sampled_from("abcde"), st.integers(0, 100), max_size=3))
    def load(self, components: dict[str, int]) -> None:
        components = {digest: self.held.get(digest, size) for digest, size in components.items()}
        try:
            plan = self.ledger.plan(components)
        except (NeverFitsError, NoRoomError):
            return
        self.loading[self.ledger.reserve(plan)] = dict(plan.new)

    @rule()
    def succeed(self) -> None:
        if self.loading:
            number, components = self.loading.popitem()
            self.ledger.settle(number, components)
            self.held |= components

    @rule()
    def fail(self) -> None:
        if self.loading:
            self.ledger.cancel(self.loading.popitem()[0])

    @rule(digest=st.sampled_from("abcde"))
    def release(self, digest: str) -> None:
        assert self.ledger.release(digest) == self.held.pop(digest, 0)

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "ledger"):
            ledger = self.ledger
            assert ledger.weight_bytes == sum(self.held.values())
            assert ledger.reserved_bytes == sum(sum(each.values()) for each in self.loading.values())
            assert ledger.weight_bytes + ledger.reserved_bytes + ledger.free_bytes == self.budget
            assert ledger.free_bytes >= 0


TestLife = Life.TestCase

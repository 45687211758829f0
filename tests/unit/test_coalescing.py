"""Which calls run next: a table of adds and asks."""

from __future__ import annotations

from collections.abc import Hashable

from denoised_server.worker.coalescing import Coalescing, Pending
from hypothesis import given
from hypothesis import strategies as st


def pending(name: str, key: Hashable = "unet", priority: int = 0) -> Pending[str]:
    return Pending(name, key, priority)


def names(batch: list[Pending[str]]) -> list[str]:
    return [each.call for each in batch]


def test_nothing_pending_gives_nothing() -> None:
    assert Coalescing(4).next() == []


def test_calls_with_equal_keys_run_together() -> None:
    calls: Coalescing[str] = Coalescing(4)
    for each in (pending("a"), pending("b", "vae"), pending("c")):
        calls.add(each)
    assert names(calls.next()) == ["a", "c"]
    assert names(calls.next()) == ["b"]


def test_a_call_without_a_key_runs_alone() -> None:
    calls: Coalescing[str] = Coalescing(4)
    for each in (pending("a", None), pending("b", None)):
        calls.add(each)
    assert names(calls.next()) == ["a"]
    assert names(calls.next()) == ["b"]


def test_a_batch_is_bounded() -> None:
    calls: Coalescing[str] = Coalescing(2)
    for name in "abc":
        calls.add(pending(name))
    assert names(calls.next()) == ["a", "b"]
    assert names(calls.next()) == ["c"]


def test_the_highest_priority_leads_and_others_come_along() -> None:
    calls: Coalescing[str] = Coalescing(4)
    for each in (pending("a", "vae"), pending("b"), pending("c", priority=5)):
        calls.add(each)
    assert names(calls.next()) == ["c", "b"]


def test_a_discarded_call_never_runs() -> None:
    calls: Coalescing[str] = Coalescing(4)
    gone = pending("a")
    calls.add(gone)
    assert calls.discard(gone)
    assert not calls.discard(gone)
    assert calls.next() == []


def test_calls_that_are_put_back_are_first_in_line() -> None:
    calls: Coalescing[str] = Coalescing(2)
    for name in "abc":
        calls.add(pending(name))
    calls.put_back(calls.next()[1:])
    assert names(calls.next()) == ["b", "c"]


def test_two_models_take_turns() -> None:
    calls: Coalescing[str] = Coalescing(4)
    calls.add(pending("one", "unet"))
    calls.add(pending("two", "transformer"))
    order = []
    for _ in range(6):
        (ran,) = calls.next()
        order.append(ran.call)
        calls.add(pending(ran.call, ran.key))
    assert order == ["one", "two"] * 3


@given(st.lists(st.tuples(st.sampled_from(["unet", "vae", None]), st.integers(-2, 2))), st.integers(1, 5))
def test_every_call_runs_exactly_once(calls: list[tuple[str | None, int]], most: int) -> None:
    queue: Coalescing[int] = Coalescing(most)
    for index, (key, priority) in enumerate(calls):
        queue.add(Pending(index, key, priority))
    ran = []
    while batch := queue.next():
        assert len(batch) <= most
        assert len({each.key for each in batch}) == 1
        assert len(batch) == 1 or batch[0].key is not None
        ran += [each.call for each in batch]
    assert sorted(ran) == list(range(len(calls)))


@given(st.lists(st.sampled_from(["unet", "vae", None]), min_size=1, max_size=8), st.integers(1, 3))
def test_no_request_waits_longer_than_one_round(kinds: list[str | None], most: int) -> None:
    queue: Coalescing[int] = Coalescing(most)
    for index, key in enumerate(kinds):
        queue.add(Pending(index, key))
    since = dict.fromkeys(range(len(kinds)), 0)
    for _ in range(40):
        batch = queue.next()
        for request in since:
            since[request] += 1
        for each in batch:
            since[each.call] = 0
            queue.add(Pending(each.call, each.key))
        assert max(since.values()) <= len(kinds)

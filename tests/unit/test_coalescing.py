"""Which calls run next: a table of adds and asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from denoised_server.worker.coalescing import OLDEST_EVERY, Coalescing, Pending, Stop
from denoised_server.worker.fairness import Entrant
from hypothesis import given, settings
from hypothesis import strategies as st


def pending(
    calls: Coalescing[str], name: str, key: Hashable = "unet", entrant: Entrant | None = None, rows: int = 1
) -> Pending[str]:
    """Adds a call of a request, a new one unless it says whose."""
    if entrant is None:
        entrant = Entrant()
        calls.enter(entrant)
    added = Pending(name, key, [entrant], rows)
    calls.add(added)
    return added


def names(batch: list[Pending[str]]) -> list[str]:
    return [each.call for each in batch]


def test_nothing_pending_gives_nothing() -> None:
    assert Coalescing[str](4).next(0) == []


def test_calls_with_equal_keys_run_together() -> None:
    calls = Coalescing[str](4)
    for name, key in (("a", "unet"), ("b", "vae"), ("c", "unet")):
        pending(calls, name, key)
    assert names(calls.next(0)) == ["a", "c"]
    assert names(calls.next(0)) == ["b"]


def test_a_call_without_a_key_runs_alone() -> None:
    calls = Coalescing[str](4)
    for name in "ab":
        pending(calls, name, None)
    assert names(calls.next(0)) == ["a"]
    assert names(calls.next(0)) == ["b"]


def test_a_batch_is_bounded() -> None:
    calls = Coalescing[str](2)
    for name in "abc":
        pending(calls, name)
    assert names(calls.next(0)) == ["a", "b"]
    assert names(calls.next(0)) == ["c"]


def test_it_counts_why_batches_were_not_larger() -> None:
    calls = Coalescing[str](2)
    for name in "abc":
        pending(calls, name)
    pending(calls, "alone", None)
    while calls:
        calls.next(0)
    assert calls.stops == {Stop.FULL: 1, Stop.UNMATCHED: 2, Stop.TIMES: 0}
    # Two samples take longer than twice one.
    for rows, seconds in ((1, 1.0), (2, 5.0)):
        for _ in range(3):
            calls.ran([pending(calls, "known", rows=rows)], seconds, as_one=True)
            calls.next(0)
    for name in "de":
        pending(calls, name)
    assert names(calls.next(0)) == ["d"]
    assert calls.stops[Stop.TIMES] == 1


def test_the_highest_priority_leads_and_others_come_along() -> None:
    calls = Coalescing[str](4)
    high = Entrant(priority=5)
    calls.enter(high)
    pending(calls, "a", "vae")
    pending(calls, "b")
    pending(calls, "c", entrant=high)
    assert names(calls.next(0)) == ["c", "b"]


def test_a_discarded_call_never_runs() -> None:
    calls = Coalescing[str](4)
    gone = pending(calls, "a")
    assert calls.discard(gone)
    assert not calls.discard(gone)
    assert calls.next(0) == []


def test_calls_that_are_put_back_are_first_in_line() -> None:
    calls = Coalescing[str](2)
    for name in "abc":
        pending(calls, name)
    calls.put_back(calls.next(0)[1:])
    assert names(calls.next(0)) == ["b", "c"]


def test_a_deadline_that_is_near_goes_before_fairness_and_one_that_is_far_does_not() -> None:
    for deadline, first in ((1000.0, "other"), (15.0, "hasty")):
        calls = Coalescing[str](4)
        hasty, other = Entrant("hasty", deadline=deadline, remaining=8.0), Entrant("other")
        calls.enter(hasty)
        calls.enter(other)
        calls.ran([pending(calls, "before", "vae", hasty)], 3.0, as_one=True)
        calls.next(0)
        pending(calls, "hasty", "unet", hasty)
        pending(calls, "other", "transformer", other)
        assert names(calls.next(0)) == [first]


def test_a_batch_that_is_slower_in_one_piece_runs_in_parts() -> None:
    calls = Coalescing[str](8)
    entrant = Entrant()
    calls.enter(entrant)
    for rows, seconds in ((1, 10.0), (4, 20.0), (8, 100.0)):
        for _ in range(3):
            calls.ran([Pending("earlier", "unet", [entrant], rows)], seconds, as_one=True)
    for name in "abcdefgh":
        pending(calls, name)
    assert len(calls.next(0)) == 4
    assert len(calls.next(0)) == 4


def steps(calls: Coalescing[str], requests: dict[str, tuple[Entrant, Hashable, float]], seconds: float) -> Counter[str]:
    """Runs requests, each with its kind of call and the time it takes, for so long; says what each got."""
    for name, (entrant, key, _) in requests.items():
        calls.enter(entrant)
        pending(calls, name, key, entrant)
    got, now = Counter[str](), 0.0
    while now < seconds:
        batch = calls.next(now)
        cost = requests[batch[0].call][2]
        now += cost
        calls.ran(batch, cost, as_one=True)
        for each in batch:
            got[each.call] += 1
            pending(calls, each.call, each.key, each.entrants[0])
    return got


def test_two_models_share_the_time_and_not_the_number_of_calls() -> None:
    got = steps(Coalescing[str](4), {"fast": (Entrant(), "unet", 0.1), "slow": (Entrant(), "flux", 1.0)}, 200)
    assert abs(got["fast"] * 0.1 - got["slow"]) < 12


def test_clients_share_the_time_whatever_number_of_requests_they_have() -> None:
    requests = {f"many {index}": (Entrant("many"), index, 0.1) for index in range(6)}
    got = steps(Coalescing[str](4), {**requests, "one": (Entrant("one"), "other", 0.1)}, 100)
    assert abs(got["one"] * 0.1 - 50) < 4


def test_a_short_request_is_not_behind_long_ones() -> None:
    calls = Coalescing[str](4)
    long = [Entrant() for _ in range(3)]
    for index, entrant in enumerate(long):
        calls.enter(entrant)
        pending(calls, f"long {index}", index, entrant)
    for _ in range(90):
        batch = calls.next(0)
        calls.ran(batch, 1.0, as_one=True)
        pending(calls, batch[0].call, batch[0].key, batch[0].entrants[0])
    short, waited = Entrant(), 0
    calls.enter(short)
    for _ in range(4):
        pending(calls, "short", "other", short)
        while True:
            waited += 1
            batch = calls.next(0)
            calls.ran(batch, 1.0, as_one=True)
            if batch[0].call == "short":
                break
            pending(calls, batch[0].call, batch[0].key, batch[0].entrants[0])
    assert waited <= 4 * 4 + 1


@given(st.lists(st.tuples(st.sampled_from(["unet", "vae", None]), st.integers(-2, 2))), st.integers(1, 5))
def test_every_call_runs_exactly_once(calls: list[tuple[str | None, int]], most: int) -> None:
    queue = Coalescing[int](most)
    for index, (key, priority) in enumerate(calls):
        entrant = Entrant(priority=priority)
        queue.enter(entrant)
        queue.add(Pending(index, key, [entrant]))
    ran = []
    while batch := queue.next(0):
        assert len(batch) <= most
        assert len({each.key for each in batch}) == 1
        assert len(batch) == 1 or batch[0].key is not None
        ran += [each.call for each in batch]
    assert sorted(ran) == list(range(len(calls)))


REQUESTS = st.tuples(
    st.sampled_from(["unet", "vae", None]),
    st.sampled_from(["ann", "bob"]),
    st.integers(-100, 100),
    st.none() | st.floats(-10, 100),
    st.floats(0.001, 10),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(REQUESTS, min_size=1, max_size=8), st.integers(1, 3))
def test_no_request_starves(requests: list[tuple[str | None, str, int, float | None, float]], most: int) -> None:
    """However priorities, deadlines, clients and costs lie, and although everybody always wants more."""
    queue = Coalescing[int](most)
    for index, (key, client, priority, deadline, _) in enumerate(requests):
        entrant = Entrant(client, priority, deadline, remaining=1.0)
        queue.enter(entrant)
        queue.add(Pending(index, key, [entrant]))
    since, now = dict.fromkeys(range(len(requests)), 0), 0.0
    for _ in range(OLDEST_EVERY * (len(requests) + 1) * 2):
        batch = queue.next(now)
        assert batch, "it never waits while something is pending"
        seconds = requests[batch[0].call][4]
        now += seconds
        queue.ran(batch, seconds, as_one=True)
        for request in since:
            since[request] += 1
        for each in batch:
            since[each.call] = 0
            queue.add(Pending(each.call, each.key, each.entrants))
        assert max(since.values()) <= OLDEST_EVERY * (len(requests) + 1)

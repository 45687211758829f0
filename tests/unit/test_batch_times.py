"""How many calls are worth joining, as far as measured."""

from __future__ import annotations

import math

from denoised_server.worker.batch_times import BELIEVED, ENOUGH, BatchTimes
from hypothesis import given
from hypothesis import strategies as st


def known(times: dict[int, float]) -> BatchTimes:
    learned = BatchTimes()
    for size, seconds in times.items():
        for _ in range(ENOUGH):
            learned.learn(size, seconds)
    return learned


def test_everything_is_joined_until_something_is_known() -> None:
    assert BatchTimes().count([1] * 8) == 8
    assert known({1: 1.0}).count([1] * 8) == 8


def test_everything_is_joined_where_larger_batches_are_faster() -> None:
    assert known({2: 20.0, 4: 28.0, 8: 44.0, 16: 75.0}).count([2] * 8) == 8


def test_a_size_from_which_on_samples_take_longer_is_not_reached() -> None:
    assert known({1: 10.0, 4: 20.0, 8: 100.0}).count([1] * 8) == 4


def test_a_rest_that_would_run_badly_is_taken_along() -> None:
    assert known({1: 10.0, 7: 14.0, 8: 18.0}).count([1] * 8) == 8


def test_a_size_is_not_called_slow_for_its_first_runs_or_for_other_work_on_the_machine() -> None:
    times = known({1: 10.0, 4: 20.0})
    for seconds in (1000.0, 500.0, 30.0, 400.0):
        assert times.count([1] * 8) == 8
        times.learn(8, seconds)
    assert times.count([1] * 8) == 8


def test_what_was_slow_once_is_measured_again() -> None:
    times = known({1: 10.0, 4: 20.0, 8: 100.0})
    counts = [times.count([1] * 8) for _ in range(BELIEVED)]
    assert counts.count(8) == 1


def test_a_batch_takes_no_longer_than_its_leader_can_wait() -> None:
    times = known({1: 1.0, 2: 1.5, 4: 2.5, 8: 4.5})
    assert times.count([1] * 8, patience=2.6) == 4
    assert times.count([1] * 8, patience=0.0) == 1


@given(
    st.dictionaries(st.integers(1, 64), st.floats(0.001, 100), max_size=8),
    st.lists(st.integers(1, 8), min_size=1, max_size=32),
    st.floats(0, 100) | st.just(math.inf),
)
def test_at_least_one_and_at_most_all_run(times: dict[int, float], sizes: list[int], patience: float) -> None:
    assert 1 <= known(times).count(sizes, patience) <= len(sizes)

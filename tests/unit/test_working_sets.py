"""What calls work in, learned: it rises at once, falls when it has not come again, and is never a reason to stop."""

from __future__ import annotations

import pytest
from denoised_server.worker.working_sets import BELIEVED_SECONDS, EVERY, RECENT, Kind, WorkingSets, bucket
from hypothesis import given
from hypothesis import strategies as st

UNET = Kind("UNet 1000", "forward", bucket(65_536), "float16")
LARGER = Kind("UNet 1000", "forward", bucket(4 * 65_536), "float16")
DECODE = Kind("VAE 100", "decode", bucket(65_536), "float16")
MIB = 1 << 20


def test_before_anything_was_measured_the_guess_is_high() -> None:
    sets = WorkingSets()
    # What a UNet of Stable Diffusion and its VAE take for a picture of 512 pixels in float32 is about half of that.
    assert sets.estimate(UNET, 1, 0.0) > 100 * MIB
    assert sets.estimate(DECODE, 1, 0.0) > 1000 * MIB
    assert sets.estimate(UNET, 4, 0.0) == 4 * sets.estimate(UNET, 1, 0.0)


def test_the_highest_of_the_latest_counts_and_it_can_fall() -> None:
    sets = WorkingSets()
    for size in (100, 300, 200):
        sets.measured(UNET, 2, size)
    assert sets.estimate(UNET, 2, 0.0) == 300
    for _ in range(RECENT):
        sets.measured(UNET, 2, 50)
    assert sets.estimate(UNET, 2, 0.0) == 50


def test_batches_that_were_not_measured_are_told_by_those_that_were() -> None:
    sets = WorkingSets()
    sets.measured(UNET, 2, 100)
    sets.measured(UNET, 8, 300)
    assert sets.estimate(UNET, 2, 0.0) == 100
    assert sets.estimate(UNET, 3, 0.0) == 300
    assert sets.estimate(UNET, 16, 0.0) == 600


def test_other_shapes_are_told_by_like_ones() -> None:
    sets = WorkingSets()
    sets.measured(UNET, 1, 100)
    assert sets.estimate(LARGER, 1, 0.0) == 1600
    assert sets.estimate(DECODE, 1, 0.0) == WorkingSets().estimate(DECODE, 1, 0.0)


def test_the_largest_batch_is_what_there_is_room_for() -> None:
    sets = WorkingSets()
    for rows in (1, 2, 4):
        sets.measured(UNET, rows, 100 * rows)
    assert sets.most(UNET, [1, 1, 1, 1], 450, 0.0) == 4
    assert sets.most(UNET, [1, 1, 1, 1], 250, 0.0) == 2
    assert sets.most(UNET, [2, 1, 1], 250, 0.0) == 1
    assert sets.most(UNET, [1, 1], 0, 0.0) == 1


def test_a_batch_that_ran_out_of_memory_is_made_smaller_for_a_while() -> None:
    sets = WorkingSets()
    sets.measured(UNET, 1, 100)
    assert sets.most(UNET, [1, 1], 1000, 0.0) == 2
    sets.exhausted(UNET, 2, 1001, 0.0)
    assert sets.most(UNET, [1, 1], 1000, 1.0) == 1
    # What is not tried cannot show that it fits by now.
    assert sets.most(UNET, [1, 1], 1000, BELIEVED_SECONDS + 1) == 2


def test_runs_are_measured_ever_more_rarely_but_never_stop_being() -> None:
    sets = WorkingSets()
    due = [run for run in range(1, 4 * EVERY + 1) if sets.is_due(UNET, 1)]
    assert due == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, EVERY, 2 * EVERY, 3 * EVERY, 4 * EVERY]
    assert sets.is_due(UNET, 2)


@given(st.integers(0, 1 << 40))
def test_a_bucket_is_at_most_a_quarter_larger_than_what_is_in_it(size: int) -> None:
    assert size <= bucket(size) <= size * 1.25 + 1
    assert bucket(bucket(size)) == bucket(size)


@given(
    st.lists(st.tuples(st.integers(1, 16), st.integers(1, 10**9), st.booleans()), max_size=30),
    st.lists(st.integers(1, 8), min_size=1, max_size=8),
    st.integers(0, 10**9),
)
@pytest.mark.filterwarnings("error")
def test_one_call_always_runs_and_more_only_where_they_are_believed_to_fit(
    history: list[tuple[int, int, bool]], rows: list[int], room: int
) -> None:
    sets = WorkingSets()
    for count, size, is_exhausted in history:
        if is_exhausted:
            sets.exhausted(UNET, count, size, 0.0)
        else:
            sets.measured(UNET, count, size)
    most = sets.most(UNET, rows, room, 1.0)
    assert 1 <= most <= len(rows)
    assert most == 1 or sets.estimate(UNET, sum(rows[:most]), 1.0) <= room

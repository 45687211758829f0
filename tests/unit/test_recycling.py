"""When a worker that holds memory which is in no book is started anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
from denoised_server.messages import Histogram, MemoryStats, Snapshot
from denoised_server.recycling import PATIENCE_SECONDS, PAUSE_SECONDS, Recycling

GIB = 2**30
NOTHING = Histogram((1.0,), (0,), 0, 0.0)
EMPTY = Snapshot(10 * GIB, 9 * GIB, 0, 0, 0, (), 0, 0, 0, 0, 0, batch_sizes=NOTHING, step_seconds=NOTHING)


def holding(unaccounted: int) -> Snapshot:
    return replace(EMPTY, memory=MemoryStats(unaccounted_bytes=unaccounted))


def times(recycling: Recycling, *looks: tuple[float, Snapshot | None, bool], worker: str = "workers/0") -> list[float]:
    return [now for now, seen, is_idle in looks if recycling.is_due(worker, seen, is_idle=is_idle, now=now)]


@pytest.mark.parametrize(
    ("limit", "unaccounted", "is_too_much"),
    [(GIB, GIB, False), (GIB, GIB + 1, True), (0.1, GIB, False), (0.1, GIB + 1, True), (0, 9 * GIB, False)],
)
def test_the_limit_is_bytes_or_a_share_of_the_device(limit: float, unaccounted: int, is_too_much: bool) -> None:
    seen = holding(unaccounted)
    due = times(Recycling(limit), (0.0, seen, True), (PATIENCE_SECONDS, seen, True))
    assert due == ([PATIENCE_SECONDS] if is_too_much else [])


def test_it_has_to_be_idle_and_too_much_all_the_time() -> None:
    much, little = holding(2 * GIB), holding(0)
    for between in ((3.0, much, False), (3.0, little, True), (3.0, None, True)):
        looks = [(0.0, much, True), between, (5.0, much, True), (9.0, much, True), (10.0, much, True)]
        assert times(Recycling(GIB), *looks) == [10.0]


def test_one_worker_is_not_started_anew_over_and_over() -> None:
    recycling, much = Recycling(GIB), holding(2 * GIB)
    every = [(float(now), much, True) for now in range(int(PAUSE_SECONDS) + 20)]
    assert times(recycling, *every) == [PATIENCE_SECONDS, PATIENCE_SECONDS + PAUSE_SECONDS]
    assert times(recycling, *every[:7], worker="workers/1") == [PATIENCE_SECONDS]

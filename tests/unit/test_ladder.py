"""Which rung is next, as a table."""

from __future__ import annotations

import pytest
from denoised_server.worker.ladder import APART, Climb, Rung


def climbed(climb: Climb) -> list[str]:
    """The rungs of a call that nothing helps, up to where its batch is taken apart."""
    tried: list[Rung] = []
    while (rung := climb.next(tried)) is not None:
        tried.append(rung)
        if rung in APART:
            break
    return [str(rung) for rung in tried]


@pytest.mark.parametrize(
    ("climb", "rungs"),
    [
        (Climb(), ["free_caches"]),
        (Climb(can_evict=True, can_offload=True), ["free_caches", "evict_idle", "offload"]),
        (Climb(requests=8, can_evict=True, can_offload=True), ["free_caches", "evict_idle", "split"]),
        (Climb(requests=2, can_offload=True), ["free_caches", "run_alone"]),
        (
            Climb(can_slice=True, can_tile=True, can_evict=True, can_offload=True),
            ["free_caches", "evict_idle", "slice", "tile", "offload"],
        ),
        (Climb(requests=3, can_slice=True, can_tile=True), ["free_caches", "slice", "tile", "split"]),
        (Climb(can_slice=True, can_tile=True, is_exact=True, can_offload=True), ["free_caches", "offload"]),
    ],
)
def test_what_is_tried_depends_on_what_the_call_is(climb: Climb, rungs: list[str]) -> None:
    assert climbed(climb) == rungs


def test_no_rung_is_tried_twice_and_every_climb_ends() -> None:
    for requests in range(1, 5):
        for flags in range(32):
            given = [bool(flags >> bit & 1) for bit in range(5)]
            rungs = climbed(Climb(requests, *given))
            assert len(rungs) == len(set(rungs))
            assert rungs[0] == "free_caches"
            assert requests == 1 or rungs[-1] in APART

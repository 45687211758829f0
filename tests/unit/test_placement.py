"""Placement as a table."""

from __future__ import annotations

import pytest
from denoised.errors import WorkerLostError
from denoised_server.messages import Derivation, Recipe, Spec
from denoised_server.placement import Candidate, choose

CAT, DOG = Recipe(Spec("cat")), Recipe(Spec("dog"))


def candidate(worker: str, free: int, *recipes: Recipe, takes_work: bool = True) -> Candidate:
    return Candidate(worker, takes_work, free, recipes)


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        ([candidate("a", 1), candidate("b", 2)], "b"),
        ([candidate("a", 5), candidate("b", 5)], "a"),
        ([candidate("a", 5, DOG), candidate("b", 5)], "b"),
        ([candidate("a", 1, CAT), candidate("b", 9)], "a"),
        ([candidate("a", 1, CAT), candidate("b", 9, DOG, CAT)], "b"),
        ([candidate("a", 1, CAT, takes_work=False), candidate("b", 0)], "b"),
        ([candidate("a", 1, Recipe(CAT.spec, (Derivation("inpainting"),))), candidate("b", 9)], "a"),
        ([candidate("a", 1, Recipe(Spec("cat", revision="main"))), candidate("b", 9)], "a"),
        ([candidate("a", 1, Recipe(Spec("cat", dtype="float16"))), candidate("b", 9)], "b"),
    ],
)
def test_the_worker_with_the_same_weights_then_most_room_then_least_to_do_is_chosen(
    candidates: list[Candidate], chosen: str
) -> None:
    assert choose(CAT, candidates) == chosen


def test_without_a_worker_that_takes_work_the_caller_may_try_again() -> None:
    with pytest.raises(WorkerLostError) as caught:
        choose(CAT, [candidate("a", 1, takes_work=False)])
    assert caught.value.retry_after

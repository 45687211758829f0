"""Placement: which worker is to hold a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from denoised.errors import WorkerLostError

from .messages import Recipe
from .recipes import shares_weights


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker as placement sees it: whether it takes work, its free budget, and the recipes it holds."""

    worker: str
    takes_work: bool
    free_bytes: int
    recipes: tuple[Recipe, ...]


def choose(recipe: Recipe, candidates: Sequence[Candidate]) -> str:
    """The worker that holds the same weights already, else has most room, else holds least, else comes first."""
    takers = [candidate for candidate in candidates if candidate.takes_work]
    if not takers:
        raise WorkerLostError("No worker takes work at the moment.", hint="Try again shortly.", retry_after=5)
    best = max(takers, key=lambda taker: (_shares(recipe, taker), taker.free_bytes, -len(taker.recipes)))
    return best.worker


def _shares(recipe: Recipe, candidate: Candidate) -> bool:
    return any(shares_weights(recipe, held) for held in candidate.recipes)

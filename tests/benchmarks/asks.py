"""What is asked of servers: one picture each, and lists of them that stand for kinds of use."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import asdict, dataclass

TASKS = ("text-to-image", "image-to-image", "inpainting")
SCHEDULERS = ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


@dataclass(frozen=True, slots=True)
class Ask:
    """One picture of 64×64 pixels; the fields mean what they mean in diffusers."""

    steps: int
    task: str = "text-to-image"
    scheduler: str = "DDIMScheduler"
    seed: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def equal(count: int, steps: int) -> list[Ask]:
    """Requests that differ in their seeds only: what request-level batching is made for."""
    return [Ask(steps, seed=seed) for seed in range(count)]


def mixed(count: int) -> list[Ask]:
    """Requests as different people send them: 4 to 50 steps, four noise schedulers, three tasks on one model."""
    dice, tasks = random.Random(0), itertools.cycle(TASKS)
    return [
        Ask(dice.choice((4, 8, 12, 20, 30, 50)), next(tasks), dice.choice(SCHEDULERS), seed) for seed in range(count)
    ]

"""One family of pipelines: how to build a tiny checkpoint of it, and what to call it with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from denoised_server.worker.families import MAPPINGS
from PIL import Image

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A name of diffusers' mappings, and one checkpoint of it.

    `build` writes a checkpoint into a folder. `variant` tells checkpoints of one name apart. `tasks` are those of the
    mappings unless the checkpoint fits fewer. `load` are further arguments of `from_pretrained`. `arguments` are those
    of each call, `by_task` those of one task; of the usual ones, those are left out that the class does not take.
    `tolerance` is what joining may change an element by, for pixels in 0…1. `needs` is a package that it needs
    beside those of development: without it the family is not run.
    """

    name: str
    build: Callable[[Path], object]
    variant: str = ""
    tasks: tuple[str, ...] = ()
    load: Arguments = field(default_factory=dict)
    size: int = 64
    arguments: Arguments = field(default_factory=dict)
    by_task: Mapping[str, Arguments] = field(default_factory=dict)
    tolerance: float = 1e-4
    needs: str = ""

    def __str__(self) -> str:
        return f"{self.name}, {self.variant}" if self.variant else self.name

    @property
    def is_missing_a_package(self) -> bool:
        return bool(self.needs) and importlib.util.find_spec(self.needs) is None

    def mapped(self) -> tuple[str, ...]:
        """Its tasks, in the order of the mappings."""
        return tuple(task for task in MAPPINGS if self.name in MAPPINGS[task] and task in (self.tasks or MAPPINGS))

    def call(self, task: str, takes: Mapping[str, Any], index: int = 0) -> dict[str, Any]:
        """Arguments of the call numbered `index`, of a class whose `__call__` takes the names in `takes`."""
        usual = {
            "prompt": f"a cat {index}",
            "num_inference_steps": 2 + index % 2,
            "height": self.size,
            "width": self.size,
            "output_type": "np",
            "image": picture(self.size),
            "mask_image": mask(self.size),
            "strength": 0.8,
        }
        left_out = {"mask_image", "image", "strength"} if task.startswith("text-to") else set()
        left_out |= {"mask_image"} if task == "image-to-image" else set()
        kept = {name: value for name, value in usual.items() if name in takes and name not in left_out}
        return kept | dict(self.arguments) | dict(self.by_task.get(task, {}))


def picture(size: int = 64, *, turned: bool = False) -> Image.Image:
    ramp = np.linspace(0, 255, size * size * 3).reshape(size, size, 3)
    return Image.fromarray((255 - ramp if turned else ramp).astype("uint8"))


def mask(size: int = 64) -> Image.Image:
    half = np.zeros((size, size), "uint8")
    half[:, size // 2 :] = 255
    return Image.fromarray(half)

"""A callback that remembers what it is told, for callbacks here and there to be compared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from denoised.callbacks import LEGACY
from diffusers import DiffusionPipeline

from .pair import numbers


class Recorder:
    """A callback of any form, which makes the latents a little smaller where its form can."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Any, Any]] = []

    def callback(self, name: str) -> Callable[..., Any]:
        """That of the parameter with this name."""
        return self._older if name == LEGACY else self.on_step_end

    def on_step_end(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.seen.append((step, numbers(timestep), {name: numbers(value) for name, value in tensors.items()}))
        return {"latents": tensors["latents"] * 0.99}

    def _older(self, step: int, timestep: Any, latents: Any) -> None:
        self.seen.append((step, numbers(timestep), numbers(latents)))

    @contextmanager
    def at_steps_of(self, pipeline: DiffusionPipeline) -> Iterator[None]:
        """Asks it where the daemon asks for families without callbacks: at the steps of their noise schedulers."""
        with ExitStack() as stack:
            for scheduler in {id(each): each for each in _noise_schedulers(pipeline)}.values():
                vars(scheduler)["step"] = self._asking(scheduler.step)
                stack.callback(vars(scheduler).pop, "step")
            yield

    def _asking(self, step: Any) -> Any:
        # Pipelines look at its signature.
        @functools.wraps(step)
        def asking(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            latents = result[0] if isinstance(result, tuple) else result.prev_sample
            timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
            changed = self.on_step_end(None, len(self.seen), timestep, {"latents": latents})["latents"]
            if isinstance(result, tuple):
                return (changed, *result[1:])
            result.prev_sample = changed
            return result

        return asking


def _noise_schedulers(pipeline: DiffusionPipeline) -> Iterator[Any]:
    for part in vars(pipeline).values():
        if isinstance(part, DiffusionPipeline):
            yield from _noise_schedulers(part)
        elif hasattr(part, "set_timesteps") and hasattr(part, "step"):
            yield part

"""The course of a generation: what is noted of it while it runs, for the observer to hear at its end."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from denoised import traces

from .messages import Finished, Output, Progress
from .observer import Course


class CourseNotes:
    """Notes of one generation. Phases are those before the worker has it, and then the worker's own."""

    def __init__(self, repo_id: str, output_type: str) -> None:
        self._repo_id, self._output_type = repo_id, output_type
        self._began = time.monotonic()
        self._steps = self._images = self._pixels = 0
        self._phases: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Notes the time that the block takes, and spans it in the trace."""
        began = time.monotonic()
        try:
            with traces.span(name):
                yield
        finally:
            self._phases[name] += time.monotonic() - began

    def note(self, event: Progress | Output | Finished) -> None:
        match event:
            case Progress():
                self._steps = max(self._steps, event.completed_steps)
            case Output(field="images"):
                count, pixels = extent(event, self._output_type)
                self._images += count
                self._pixels += pixels
            case Finished():
                self._steps = max(self._steps, event.steps)
                for name, seconds in event.phase_seconds().items():
                    self._phases[name] += seconds

    def end(self, outcome: str, task: str) -> Course:
        return Course(
            repo_id=self._repo_id,
            task=task,
            outcome=outcome,
            seconds=time.monotonic() - self._began,
            steps=self._steps,
            images=self._images,
            pixels=self._pixels,
            phases=dict(self._phases),
        )


def extent(output: Output, output_type: str) -> tuple[int, int]:
    """The images in one output and their pixels: one picture each, or an array of all of them. Latents are none yet."""
    match output_type, output.artifact.shape:
        case "latent", _:
            return 0, 0
        case "np", (count, height, width, _):
            return count, count * height * width
        case "pt", (count, _, height, width):
            return count, count * height * width
    return 1, output.width * output.height

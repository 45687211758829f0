"""One checkpoint twice: in this process with diffusers, and in a daemon."""

from __future__ import annotations

import inspect
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import denoised
import diffusers
import numpy as np
import torch
import transformers
from denoised_server.worker import families, overrides, phases
from PIL import Image

from .checkpoints.family import Family

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

AUTO_CLASSES = {
    "text-to-image": "AutoPipelineForText2Image",
    "image-to-image": "AutoPipelineForImage2Image",
    "inpainting": "AutoPipelineForInpainting",
    "text-to-audio": "AutoPipelineForText2Audio",
    "text-to-video": "AutoPipelineForText2Video",
    "image-to-video": "AutoPipelineForImage2Video",
    "video-to-video": "AutoPipelineForVideo2Video",
}

# Workers report a few times a second.
REPORTED_SECONDS = 0.5


class Pair:
    """A family's checkpoint, loaded on both sides for the first of its tasks and derived for the others."""

    def __init__(
        self,
        family: Family,
        local: Mapping[str, Any],
        remote: Mapping[str, denoised.Pipeline],
        joined_calls: Callable[[], Mapping[str, int]],
    ) -> None:
        self.family, self.local, self.remote = family, local, remote
        self._joined_calls, self._joined_before = joined_calls, joined_calls()

    def arguments(self, task: str, index: int = 0) -> dict[str, Any]:
        takes = inspect.signature(type(self.local[task]).__call__).parameters
        return self.family.call(task, takes, index)

    def here(self, task: str, index: int = 0, **more: Any) -> dict[str, Any]:
        """What diffusers returns."""
        # Some draw from torch's own generator too, which the daemon starts from the seed.
        torch.manual_seed(index)
        with torch.no_grad():
            result = self.local[task](**self.arguments(task, index) | more, generator=seeded(index))
        return dict(result)

    def there(self, task: str, index: int = 0, *, batching: str, **more: Any) -> denoised.PipelineOutput:
        """What the daemon returns."""
        pipe: Any = self.remote[task]
        arguments = self.arguments(task, index) | more
        result: denoised.PipelineOutput = pipe(**arguments, generator=seeded(index), batching=batching)
        return result

    def together(self, task: str, count: int) -> list[denoised.PipelineOutput]:
        """What the daemon returns to `count` requests at once."""
        with ThreadPoolExecutor(count) as threads:
            return list(threads.map(lambda index: self.there(task, index, batching="allow"), range(count)))

    def denoisers(self, task: str) -> set[str]:
        """Methods that a request calls at its steps, as a worker names them."""
        modules = overrides.modules(self.local[task].components).values()
        return {f"{type(module).__name__}.forward" for module in modules if phases.of(module, "forward") == "denoise"}

    def joined(self, methods: Collection[str], *, wait: bool) -> set[str]:
        """Those of these methods of which calls were joined since the pair was made; waits for the worker to say so."""
        end = time.monotonic() + (REPORTED_SECONDS if wait else 0.0)
        while True:
            calls = self._joined_calls()
            found = {name for name in methods if calls.get(name, 0) > self._joined_before.get(name, 0)}
            if found == set(methods) or time.monotonic() > end:
                return found
            time.sleep(0.02)


class Pairs:
    """The pair that is wanted now; the one before leaves nothing behind, on neither side."""

    def __init__(self, client: denoised.Client, folder: Path) -> None:
        self._client, self._folder = client, folder
        self._pair: Pair | None = None

    def __enter__(self) -> Pairs:
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()

    def of(self, family: Family) -> Pair:
        if self._pair is None or self._pair.family is not family:
            self._drop()
            self._pair = self._make(family)
        return self._pair

    def _make(self, family: Family) -> Pair:
        """Builds the checkpoint, loads it on both sides for the family's first task, and derives the others."""
        torch.manual_seed(0)
        family.build(self._folder / "checkpoint")
        first, *others = family.mapped()
        name, options = str(self._folder / "checkpoint"), dict(family.load)
        local = {first: families.auto_class(first).from_pretrained(name, **options)}
        remote = {first: getattr(denoised, AUTO_CLASSES[first]).from_pretrained(name, client=self._client, **options)}
        for task in others:
            local[task] = families.auto_class(task).from_pipe(local[first])
            remote[task] = getattr(denoised, AUTO_CLASSES[task]).from_pipe(remote[first])
        for pipeline in local.values():
            pipeline.set_progress_bar_config(disable=True)
        return Pair(family, local, remote, self._joined_calls)

    def _joined_calls(self) -> dict[str, int]:
        engine = self._client.workers()[0].engine
        return {stats.method: stats.joined_call_count for stats in engine.methods}

    def _drop(self) -> None:
        if self._pair is not None:
            for pipe in self._pair.remote.values():
                pipe.unload()
        self._pair = None
        shutil.rmtree(self._folder, ignore_errors=True)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(value: Any) -> Any:
    """An output as arrays; what is no media stays as it is."""
    if isinstance(value, Image.Image):
        return np.asarray(value)
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, list):
        return [numbers(item) for item in value]
    return value

"""A real Worker in the test's own process, driven by its commands."""

from __future__ import annotations

import itertools
import queue
from typing import Any

from denoised import media
from denoised_server.messages import (
    Adapter,
    Command,
    Derivation,
    Derive,
    Done,
    End,
    Event,
    Failed,
    Finished,
    Generate,
    Load,
    Loaded,
    Output,
    Recipe,
    Snapshot,
    Spec,
    Unload,
    Unloaded,
    WorkerSettings,
)
from denoised_server.worker.worker import Worker


class Running:
    """One command under way."""

    def __init__(self, worker: Worker, number: int, command: Command) -> None:
        self._worker, self.number = worker, number
        self._events: queue.SimpleQueue[Event | End] = queue.SimpleQueue()
        worker.submit(number, command, self._take)

    def _take(self, *events: Event | End) -> None:
        for event in events:
            self._events.put(event)

    def next(self) -> Event | End:
        return self._events.get(timeout=60)

    def cancel(self) -> None:
        self._worker.cancel(self.number)

    def result(self) -> list[Any]:
        """Every event; raises what the command failed with."""
        events = []
        while not isinstance(event := self.next(), Done | Failed):
            events.append(event)
        if isinstance(event, Failed):
            raise event.error
        return events


class Driver:
    """Loads, derives, generates, and reads the worker's mind."""

    def __init__(self, *allowed: object, budget: int | float = 0.9, max_joined: int = 32, **rules: Any) -> None:
        settings = WorkerSettings(
            device="cpu",
            threads=1,
            budget=budget,
            allow_dirs=tuple(map(str, allowed)),
            state_dir="",
            max_joined=max_joined,
            verbose=False,
            **rules,
        )
        self.worker, self._numbers = Worker(settings), itertools.count()

    def start(self, command: Command) -> Running:
        return Running(self.worker, next(self._numbers), command)

    def load(self, name: str, folder: object, task: str = "text-to-image", **spec: Any) -> Loaded:
        loaded: Loaded = self.start(Load(name, Recipe(Spec(str(folder), task=task, **spec)))).result()[-1]
        return loaded

    def derive(self, name: str, source: str, task: str, **derivation: Any) -> Loaded:
        loaded: Loaded = self.start(Derive(name, source, Derivation(task, **derivation))).result()[-1]
        return loaded

    def unload(self, name: str) -> int:
        unloaded: Unloaded = self.start(Unload(name)).result()[-1]
        return unloaded.freed_bytes

    def generate(
        self,
        name: str,
        *,
        seed: int = 0,
        forbid: bool = False,
        output_type: str = "np",
        adapters: tuple[Adapter, ...] | None = None,
        **arguments: object,
    ) -> Running:
        packed = {key: media.pack(value) for key, value in arguments.items()}
        return self.start(
            Generate(name, packed, seeds=(seed,), output_type=output_type, forbid_batching=forbid, adapters=adapters),
        )

    def snapshot(self) -> Snapshot:
        return self.worker._snapshot()

    def close(self) -> None:
        self.worker.close()


def images(events: list[Any]) -> Any:
    """What a finished generation put out."""
    outputs = [media.unpack(event.artifact) for event in events if isinstance(event, Output)]
    return outputs[0] if len(outputs) == 1 else outputs


def finished(events: list[Any]) -> Finished:
    (event,) = [event for event in events if isinstance(event, Finished)]
    return event

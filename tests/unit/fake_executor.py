"""An executor without processes: small, working, and able to be slow, to fail and to die."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

from denoised.errors import (
    InternalError,
    InvalidNoiseSchedulerError,
    NotAPipelineError,
    PipelineNotFoundError,
    WorkerLostError,
)
from denoised.values import Artifact
from denoised_server.channel import Channel
from denoised_server.messages import (
    Beat,
    Command,
    Component,
    Derive,
    Event,
    Finished,
    Generate,
    Heartbeat,
    HeldComponent,
    Histogram,
    Load,
    Loaded,
    LoadProgress,
    NoiseScheduler,
    Outcome,
    Output,
    Parameter,
    Plan,
    Planned,
    PlannedComponent,
    Progress,
    Ready,
    Reply,
    Snapshot,
    StepEnd,
    Unload,
    Unloaded,
    Update,
    Watch,
)

Kind = TypeVar("Kind", bound=Command)

WEIGHT_BYTES = 1000
PARAMETERS = (
    Parameter("prompt", "str | list[str]", frozenset({"str", "list", "none"}), default=None, has_default=True),
    Parameter("height", "int | None", frozenset({"int", "none"}), default=None, has_default=True),
    Parameter("width", "int | None", frozenset({"int", "none"}), default=None, has_default=True),
    Parameter("num_inference_steps", "int", frozenset({"int"}), default=50, has_default=True),
    Parameter("guidance_scale", "float", frozenset({"float"}), default=7.5, has_default=True),
    Parameter("num_images_per_prompt", "int", frozenset({"int"}), default=1, has_default=True),
    Parameter("image", "PipelineImageInput", frozenset()),
)
NOTHING_OBSERVED = Histogram((1.0,), (0,), 0, 0.0)


@dataclass
class FakeWorker:
    """One worker. `pipelines` are those it holds, with the name of their weights."""

    name: str
    is_alive: bool = True
    pipelines: dict[str, str] = field(default_factory=dict)
    running: dict[asyncio.Task[None], Channel[Event]] = field(default_factory=dict)


class FakeExecutor:
    """Does at once what commands say, unless told to hold them.

    `log` has every command in the order of arrival, `cancelled` those that were closed early. Weights named "absent"
    cannot be loaded and those named "die" kill the worker, as does the prompt "die"; "die at the end" does so once,
    after its output; "bug" raises InternalError; with the prompt "hang" steps follow each other until the command is
    cancelled.
    `replies` has what callbacks replied.
    """

    def __init__(self, workers: int = 1) -> None:
        self.workers = {f"workers/{index}": FakeWorker(f"workers/{index}") for index in range(workers)}
        self.log: list[Command] = []
        self.cancelled: list[Command] = []
        self.failing_restarts = 0
        self.turn_seconds = 0.0
        self.restart_error: Exception = WorkerLostError("It does not come up.")
        self.replies: list[Reply] = []
        self._replies: dict[str, asyncio.Queue[Reply]] = {}
        self._held: set[type[Command]] = set()
        self._released = asyncio.Event()
        self._changed = asyncio.Event()
        self._deaths = Channel[str]()

    # What an executor does

    async def start(self) -> list[str]:
        return list(self.workers)

    async def submit(self, worker: str, command: Command) -> AsyncGenerator[Event, None]:
        place = self.workers[worker]
        if not place.is_alive:
            raise WorkerLostError(f"{worker} is dead.", retry_after=1)
        self.log.append(command)
        events = Channel[Event]()
        task = asyncio.create_task(self._run(place, command, events))
        place.running[task] = events
        try:
            async for event in events:
                yield event
        finally:
            place.running.pop(task, None)
            if not task.done():
                self.cancelled.append(command)
                task.cancel()
                await asyncio.wait([task])

    def info(self, worker: str) -> Ready:
        return Ready(1234, "here", "cpu", "fake", {"torch": "1.0"}, ("demo",))

    def deaths(self) -> AsyncIterator[str]:
        return self._deaths

    async def restart(self, worker: str) -> None:
        if self.failing_restarts:
            self.failing_restarts -= 1
            raise self.restart_error
        self.workers[worker] = FakeWorker(worker)

    async def stop(self) -> None:
        for name in self.workers:
            self._end(name)
        self._deaths.end()

    # What tests do with it

    def hold(self, *kinds: type[Command]) -> None:
        """Makes commands of these kinds wait before they do anything."""
        self._held.update(kinds)

    def release(self) -> None:
        self._held.clear()
        self._released.set()
        self._released = asyncio.Event()

    def kill(self, worker: str) -> None:
        self._deaths.put(worker)
        self._end(worker)

    def sent(self, kind: type[Kind]) -> list[Kind]:
        """Commands of a kind that have arrived."""
        return [command for command in self.log if isinstance(command, kind)]

    # How it works

    def _end(self, worker: str) -> None:
        place = self.workers[worker]
        place.is_alive = False
        for task, events in tuple(place.running.items()):
            events.end(WorkerLostError(f"{worker} died.", retry_after=1))
            task.cancel()
        place.running.clear()
        place.pipelines.clear()
        self._note_change()

    async def _run(self, place: FakeWorker, command: Command, events: Channel[Event]) -> None:
        try:
            while type(command) in self._held:
                await self._released.wait()
            await self._answer(place, command, events)
        except Exception as error:
            events.end(error)
        else:
            events.end()

    async def _answer(self, place: FakeWorker, command: Command, events: Channel[Event]) -> None:
        match command:
            case Load():
                weights = command.recipe.spec.repo_id
                events.put(LoadProgress("reading weights", "unet", 0, WEIGHT_BYTES))
                await asyncio.sleep(0)
                if weights == "absent":
                    raise NotAPipelineError("Nothing is here.", hint="Look elsewhere.")
                if weights == "die":
                    self.kill(place.name)
                self._hold_pipeline(place, command.pipeline, weights)
                events.put(replace(_loaded(weights), settings=command.recipe.settings))
            case Plan():
                events.put(_planned(place, command.recipe.spec.repo_id))
            case Derive():
                self._hold_pipeline(place, command.pipeline, self._weights(place, command.source))
                events.put(replace(_loaded(place.pipelines[command.pipeline]), settings=command.settings))
            case Update():
                self._weights(place, command.pipeline)
                if command.settings.noise_scheduler == NoiseScheduler("NoSuchScheduler"):
                    raise InvalidNoiseSchedulerError("There is no such noise scheduler.")
                events.put(replace(_loaded(place.pipelines[command.pipeline]), settings=command.settings))
            case Unload():
                weights = self._weights(place, command.pipeline)
                del place.pipelines[command.pipeline]
                self._note_change()
                events.put(Unloaded(0 if weights in place.pipelines.values() else WEIGHT_BYTES))
            case Generate():
                await self._generate(place, command, events)
            case Reply():
                self._replies[command.conversation].put_nowait(command)
            case Beat():
                while True:
                    events.put(Heartbeat(self.turn_seconds))
                    await asyncio.sleep(command.interval)
            case Watch():
                while True:
                    events.put(_snapshot(place))
                    changed = self._changed
                    await changed.wait()

    async def _generate(self, place: FakeWorker, command: Generate, events: Channel[Event]) -> None:
        self._weights(place, command.pipeline)
        prompt = command.arguments.get("prompt")
        if prompt == "die":
            self.kill(place.name)
        if prompt == "bug":
            raise InternalError("The worker failed in a way it should not.")
        steps = command.arguments.get("num_inference_steps", 3)
        assert isinstance(steps, int)
        done = 0
        while done < steps or prompt == "hang":
            done += 1
            for name, callback in command.callbacks.items():
                replies = self._replies.setdefault(command.conversation, asyncio.Queue())
                latents = dict.fromkeys(callback.tensor_inputs, 0.5)
                events.put(StepEnd(name, done - 1, 999, latents, {"_guidance_scale": 7.5}))
                self.replies.append(await replies.get())
            events.put(Progress(done, steps))
            await asyncio.sleep(0)
        seed = command.seeds[0] if command.seeds else None
        if prompt == "die at the end" and self.sent(Generate).count(command) > 1:
            prompt = "die no more"
        events.put(Output("images", 0, Artifact("image/png", str(prompt).encode()), seed))
        if prompt == "die at the end":
            # Not at once: what was said before arrives.
            await asyncio.sleep(0.01)
            self.kill(place.name)
        events.put(Finished(0.25, 0.125, 0.0, calls=done, joined_calls=0, max_joined=1, generators=command.generators))

    def _hold_pipeline(self, place: FakeWorker, pipeline: str, weights: str) -> None:
        assert pipeline not in place.pipelines, f"{pipeline} is held twice"
        place.pipelines[pipeline] = weights
        self._note_change()

    def _weights(self, place: FakeWorker, pipeline: str) -> str:
        if pipeline not in place.pipelines:
            raise PipelineNotFoundError(f"{place.name} holds no {pipeline}.")
        return place.pipelines[pipeline]

    def _note_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _loaded(weights: str) -> Loaded:
    unet = Component("unet", "FakeUNet", f"sha-{weights}", WEIGHT_BYTES, "float32")
    return Loaded("text-to-image", "FakePipeline", (unet, Component("tokenizer", "FakeTokenizer")), PARAMETERS, "")


def _planned(place: FakeWorker, weights: str) -> Planned:
    held = [part for part in _snapshot(place).components if part.digest == f"sha-{weights}"]
    new = 0 if held else WEIGHT_BYTES
    unet = PlannedComponent("unet", "FakeUNet", f"sha-{weights}", WEIGHT_BYTES, "float32", {"F32": 1000}, bool(held))
    # To show that handles which somebody may not see are not told.
    evicted = () if held else _snapshot(place).components
    sizes = {"new_bytes": new, "shared_bytes": WEIGHT_BYTES - new, "free_bytes": 500, "evictable_bytes": 2000}
    outcome = Outcome.FITS if held else Outcome.EVICTS
    return Planned(outcome, (unet,), **sizes, budget_bytes=9_000, evicted=evicted, download_bytes=0, load_seconds=0.5)


def _snapshot(place: FakeWorker) -> Snapshot:
    held = tuple(
        HeldComponent(
            f"sha-{weights}",
            "FakeUNet",
            WEIGHT_BYTES,
            tuple(name for name, other in place.pipelines.items() if other == weights),
        )
        for weights in sorted(set(place.pipelines.values()))
    )
    return Snapshot(
        total_bytes=10_000,
        budget_bytes=9_000,
        weight_bytes=WEIGHT_BYTES * len(held),
        reserved_bytes=0,
        process_bytes=5_000,
        components=held,
        calls=0,
        batches=0,
        joined_calls=0,
        verified_kinds=0,
        refused_kinds=0,
        batch_sizes=NOTHING_OBSERVED,
        step_seconds=NOTHING_OBSERVED,
    )

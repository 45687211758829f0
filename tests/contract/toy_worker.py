"""A worker without torch: small, real, and able to be slow, to fail and to die."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

from denoised.errors import NotAPipelineError, PipelineNotFoundError
from denoised.values import Artifact
from denoised_server.messages import (
    Beat,
    Command,
    Component,
    Derive,
    Done,
    End,
    Event,
    Failed,
    Finished,
    Generate,
    Heartbeat,
    HeldComponent,
    Histogram,
    Load,
    Loaded,
    LoadProgress,
    Output,
    Parameter,
    Progress,
    Ready,
    Snapshot,
    Unload,
    Unloaded,
    Watch,
    WorkerSettings,
)

PARAMETERS = (
    Parameter("prompt", "str | list[str]", frozenset({"str", "list", "none"}), default=None, has_default=True),
    Parameter("height", "int | None", frozenset({"int", "none"}), default=None, has_default=True),
    Parameter("width", "int | None", frozenset({"int", "none"}), default=None, has_default=True),
    Parameter("num_inference_steps", "int", frozenset({"int"}), default=50, has_default=True),
    Parameter("guidance_scale", "float", frozenset({"float"}), default=7.5, has_default=True),
    Parameter("num_images_per_prompt", "int", frozenset({"int"}), default=1, has_default=True),
)
WEIGHT_BYTES = 1000
STEP_SECONDS = 0.002
SLOW_SECONDS = 0.4


class ToyWorker:
    """Every command on a thread of its own. What it does with a pipeline says its prompt or the name of its weights:

    "die" kills the process, "bug" raises what nobody expects, a prompt of "hang" makes steps until it is cancelled, and
    weights named "absent" cannot be loaded. "slowly" decodes and "slow" loads take a while.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        if settings.device == "broken":
            raise RuntimeError("this device is broken")
        if settings.device == "slow to start":
            time.sleep(60)
        self._settings = settings
        self._pipelines: dict[str, str] = {}
        self._cancelled: set[int] = set()
        self._steps = 0

    def ready(self) -> Ready:
        return Ready(os.getpid(), "here", self._settings.device, "toy", {"toy": "1"}, ("demo",))

    def submit(self, number: int, command: Command, emit: Callable[[Event | End], None]) -> None:
        threading.Thread(target=self._run, args=(number, command, emit), daemon=True).start()

    def cancel(self, number: int) -> None:
        self._cancelled.add(number)

    def close(self) -> None:
        pass

    def _run(self, number: int, command: Command, emit: Callable[[Event | End], None]) -> None:
        try:
            for event in self._events(command):
                if number in self._cancelled:
                    break
                emit(event)
        except Exception as error:
            emit(Failed(error))
        else:
            emit(Done())

    def _events(self, command: Command) -> Iterator[Event]:
        match command:
            case Load():
                yield from self._load(command)
            case Derive():
                self._pipelines[command.pipeline] = self._weights(command.source)
                yield self._loaded(command.pipeline)
            case Generate():
                yield from self._generate(command)
            case Unload():
                weights = self._weights(command.pipeline)
                del self._pipelines[command.pipeline]
                yield Unloaded(0 if weights in self._pipelines.values() else WEIGHT_BYTES)
            case Watch():
                yield from self._watch(command)
            case Beat():
                while True:
                    yield Heartbeat(0.0)
                    time.sleep(command.interval)

    def _weights(self, pipeline: str) -> str:
        if pipeline not in self._pipelines:
            raise PipelineNotFoundError(f"no {pipeline} here")
        return self._pipelines[pipeline]

    def _load(self, command: Load) -> Iterator[Event]:
        weights = command.recipe.spec.repo_id
        if weights == "absent":
            raise NotAPipelineError("nothing here", hint="look elsewhere", metadata={"repo_id": weights})
        if weights == "die":
            os._exit(3)
        for done in range(0, WEIGHT_BYTES + 1, WEIGHT_BYTES // 4):
            yield LoadProgress("reading weights", "unet", done, WEIGHT_BYTES)
            time.sleep(SLOW_SECONDS if weights == "slow" else STEP_SECONDS)
        self._pipelines[command.pipeline] = weights
        yield self._loaded(command.pipeline)

    def _loaded(self, pipeline: str) -> Loaded:
        component = Component("unet", "ToyUNet", f"sha-{self._pipelines[pipeline]}", WEIGHT_BYTES, "float32")
        return Loaded("text-to-image", "ToyPipeline", (component, Component("tokenizer", "Toy")), PARAMETERS)

    def _generate(self, command: Generate) -> Iterator[Event]:
        self._weights(command.pipeline)
        prompt = command.arguments.get("prompt")
        if prompt == "die":
            os._exit(3)
        if prompt == "bug":
            raise ZeroDivisionError("a secret")
        steps = command.arguments.get("num_inference_steps", 3)
        assert isinstance(steps, int)
        done = 0
        while done < steps or prompt == "hang":
            done, self._steps = done + 1, self._steps + 1
            yield Progress(done, steps)
            time.sleep(STEP_SECONDS)
        if prompt == "slowly":
            time.sleep(SLOW_SECONDS)
            yield Output("images", 1, Artifact("image/png", b"first"), command.seeds[0])
            time.sleep(SLOW_SECONDS)
        yield Output("images", 0, Artifact("image/png", str(prompt).encode()), command.seeds[0])
        yield Finished(done * STEP_SECONDS, 0.0, 0.0, calls=done, joined_calls=0, max_joined=1)

    def _watch(self, command: Watch) -> Iterator[Event]:
        last = None
        while True:
            snapshot = self._snapshot()
            if snapshot != last:
                yield snapshot
            last = snapshot
            time.sleep(command.interval)

    def _snapshot(self) -> Snapshot:
        pipelines = dict(self._pipelines)
        weights = sorted(set(pipelines.values()))
        held = [
            HeldComponent(
                f"sha-{name}", "ToyUNet", WEIGHT_BYTES, tuple(key for key, value in pipelines.items() if value == name)
            )
            for name in weights
        ]
        histogram = Histogram((1.0, 2.0), (self._steps, self._steps), self._steps, float(self._steps))
        return Snapshot(
            total_bytes=10_000,
            budget_bytes=9_000,
            weight_bytes=WEIGHT_BYTES * len(held),
            reserved_bytes=0,
            process_bytes=5_000,
            components=tuple(held),
            calls=self._steps,
            batches=self._steps,
            joined_calls=0,
            verified_kinds=0,
            refused_kinds=0,
            batch_sizes=histogram,
            step_seconds=histogram,
        )

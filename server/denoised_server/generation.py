"""One generation in flight: what was asked, how far it is, and the log of its events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from denoised.errors import CallbackTimeoutError, DeadlineExceededError, DenoisedError, GenerationCancelledError

from . import codec
from .callers import DAEMON, Caller
from .course import CourseNotes
from .eventlog import EventLog
from .forecast import UNKNOWN, Cost, Demand
from .handles import Handle
from .messages import Finished, Generate, Loaded, Output, PhaseBegan, Preview, Progress, Ready, Recipe, StepEnd
from .pace import Pace
from .replays import Deaths

# Number of a first step; that of Started is 1.
FIRST_STEP = 1


class State(StrEnum):
    """Where a generation is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Terms:
    """How a caller wants a generation run; mirrors the fields of GenerateRequest.

    One that is `detached` goes on without its caller, and its result is kept. `owner` is the name of the caller.
    """

    request_id: str = ""
    detached: bool = False
    owner: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """What a repeated request is known by."""
        return self.owner, self.request_id


@codec.kept
@dataclass(frozen=True, slots=True)
class Started:
    """The generation was accepted under a name."""

    name: str
    seeds: tuple[int, ...]


@codec.kept
@dataclass(frozen=True, slots=True)
class Queued:
    """The generation waits; so many will run before it.

    When it is expected to start is in seconds since the epoch; None where nobody knows.
    """

    position: int
    expected_start_time: float | None = field(default=None, compare=False)


@codec.kept
@dataclass(frozen=True, slots=True)
class Making:
    """What outputs are made with and from: the pipeline as it was when the run began, and the worker."""

    command: Generate
    recipe: Recipe
    loaded: Loaded
    ready: Ready


@codec.kept
@dataclass(frozen=True, slots=True)
class Summary:
    """The generation is over. Times in seconds; no seeds where the caller sent generator states.

    `replays` counts how often it was started again because its worker had died.
    """

    queue_seconds: float
    finished: Finished
    seeds: tuple[int, ...]
    making: Making
    replays: int = 0


GenerationEvent = Started | Queued | Progress | PhaseBegan | Preview | StepEnd | Output | Summary


@codec.kept
@dataclass(frozen=True, slots=True)
class GenerationView:
    """One generation at one moment. Times are seconds since the epoch, 0 for what has not happened."""

    name: str
    number: int
    pipeline: str
    state: State
    detached: bool
    progress: Progress | None
    seeds: tuple[int, ...]
    output_type: str
    media_type: str
    quality: int
    create_time: float
    end_time: float = 0.0
    expire_time: float = 0.0
    size_bytes: int = 0
    error_reason: str = ""
    error_message: str = ""
    owner: str = ""

    def __post_init__(self) -> None:
        # The journal knows texts.
        object.__setattr__(self, "state", State(self.state))

    def with_error(self, error: Exception | None) -> GenerationView:
        if not isinstance(error, DenoisedError) or self.state is not State.FAILED:
            return self
        return replace(self, error_reason=error.reason, error_message=str(error))


@dataclass(eq=False, slots=True)
class Generation:
    """Runs apart from its callers, so that it can be ended while they are busy with slow connections.

    `asked` is the command as it came, `command` the one with seeds. `worker` is empty while it does not run;
    `was_alone` says that its worker died with nothing else running on it; `is_left_for_later` that the next process is
    to run it. `demand` and `cost` are what it asks for and what is known of that, once its pipeline is known.
    `hears` says that replies may come.
    """

    name: str
    number: int
    handle: Handle
    asked: Generate
    command: Generate
    terms: Terms
    create_time: float
    notes: CourseNotes
    caller: Caller = DAEMON
    is_counted_waiting: bool = False
    log: EventLog[GenerationEvent] = field(default_factory=EventLog)
    state: State = State.WAITING
    worker: str = ""
    progress: Progress | None = None
    end_time: float = 0.0
    readers: int = 0
    deaths: Deaths = field(default_factory=Deaths)
    must_run_alone: bool = False
    was_alone: bool = False
    has_begun: bool = False
    is_left_for_later: bool = False
    hears: bool = True
    demand: Demand | None = None
    cost: Cost = UNKNOWN
    _asking: str = ""
    _overdue: asyncio.TimerHandle | None = None
    _pace: Pace | None = None
    _delivered: set[tuple[str, int | None, int]] = field(default_factory=set)
    _task: asyncio.Task[None] | None = None
    _listening: asyncio.Task[None] | None = None

    @property
    def is_over(self) -> bool:
        return self.log.is_ended

    @property
    def outcome(self) -> str:
        """ "ok", the reason of its error in lower case, or "cancelled" where its callers have left."""
        if self.state is State.SUCCEEDED:
            return "ok"
        if not self.is_over:
            return "cancelled"
        return self.log.error.reason.lower() if isinstance(self.log.error, DenoisedError) else "internal"

    def view(self) -> GenerationView:
        command = self.command
        view = GenerationView(
            name=self.name,
            number=self.number,
            pipeline=self.handle.name,
            state=self.state,
            detached=self.terms.detached,
            progress=self.progress,
            seeds=command.seeds,
            output_type=command.output_type,
            media_type=command.media_type,
            quality=command.quality,
            create_time=self.create_time,
            end_time=self.end_time,
            owner=self.terms.owner,
        )
        return view.with_error(self.log.error)

    def begin(self, work: Callable[[], Awaitable[None]], ended: Callable[[], None]) -> None:
        """Starts the work, which puts its events into the log; `ended` is called when nothing of it runs any more."""
        self._task = asyncio.create_task(self._run(work), name=self.name)
        self._task.add_done_callback(lambda _: ended())
        if (left := self.left()) is not None:
            timer = asyncio.get_running_loop().call_later(left, self._expire)
            self._task.add_done_callback(lambda _: timer.cancel())

    def left(self) -> float | None:
        """Seconds until its deadline; None where it has none."""
        timeout = self.command.timeout
        return None if timeout is None else max(0.0, self.create_time + timeout - time.time())

    def listen(self, listening: Coroutine[Any, Any, None]) -> None:
        """Takes replies for as long as it runs."""
        self._listening = asyncio.create_task(listening)

    @property
    def is_asking(self) -> bool:
        """Whether its worker waits for a reply."""
        return bool(self._asking)

    def ask(self, event: StepEnd, *, patience: float) -> None:
        """Passes on what its worker waits for a reply to; it ends when none comes for so many seconds."""
        self._asking = self.worker
        self._overdue = asyncio.get_running_loop().call_later(patience, self.interrupt, _no_reply(event, patience))
        self.log.put(event)

    def answered(self) -> str:
        """The worker that has waited for a reply, and now does not any more; empty where none has."""
        if self._overdue is not None:
            self._overdue.cancel()
        worker, self._asking = self._asking, ""
        return worker

    def interrupt(self, error: DenoisedError) -> None:
        """Ends it now; its readers get the error."""
        self._end(error)
        if self._task is not None:
            self._task.cancel()

    async def leave(self) -> None:
        """Ends it because nobody waits for it; returns when nothing of it runs any more."""
        self.answered()
        if self._listening is not None:
            self._listening.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def queued(self, position: int, expected_start_time: float | None = None) -> None:
        # Whoever has seen steps is not told of queues again, though a replay may have to wait.
        if self.progress is None:
            self.log.put(Queued(position, expected_start_time), at_least=None)

    def admitted(self, worker: str) -> None:
        """Runs from now on."""
        self.worker, self.state, self._pace = worker, State.RUNNING, Pace(self.cost, time.time())

    def _expect(self, progress: Progress | None) -> float | None:
        if self._pace is None:
            return None
        done, total = (progress.completed_steps, progress.total_steps) if progress else (0, 0)
        return self._pace.end(done, total, time.time())

    def advance(self, event: Progress | PhaseBegan | Preview | Output) -> bool:
        """Passes an event on; says whether it is new. A replay begins with what has been seen before."""
        match event:
            case Progress():
                if self.progress and event.completed_steps <= self.progress.completed_steps:
                    return False
                self.progress = event = replace(event, expected_end_time=self._expect(event))
                # Not every step may be told of, and not the same ones in a replay.
                self.log.put(event, at_least=event.completed_steps + FIRST_STEP)
            case PhaseBegan():
                if self.progress and event.completed_steps < self.progress.completed_steps:
                    return False
                self.log.put(replace(event, expected_end_time=self._expect(self.progress)), at_least=None)
            case Preview():
                self.log.show(event.index, event)
            case Output():
                place = (event.field, event.group, event.index)
                if place in self._delivered:
                    return False
                self._delivered.add(place)
                self.log.put(event)
        return True

    def _expire(self) -> None:
        if self.progress is not None:
            where = f"after {self.progress.completed_steps} of {self.progress.total_steps} steps"
        else:
            where = "before its first step" if self.worker else "while it waited"
        self.interrupt(
            DeadlineExceededError(
                f"The deadline passed {where}.", hint="Allow more time.", metadata={"generation": self.name}
            )
        )

    async def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception as error:
            self._end(error)
        else:
            self._end(None)

    def _end(self, error: Exception | None) -> None:
        self.answered()
        if not self.log.is_ended:
            self.end_time = time.time()
            match error:
                case None:
                    self.state = State.SUCCEEDED
                case GenerationCancelledError():
                    self.state = State.CANCELLED
                case _:
                    self.state = State.FAILED
            self.log.end(error)
            if self._listening is not None and self._listening is not asyncio.current_task():
                self._listening.cancel()


def _no_reply(event: StepEnd, patience: float) -> CallbackTimeoutError:
    return CallbackTimeoutError(
        f"{event.callback} was asked at step {event.step}, and no reply came for {patience:g} seconds.",
        hint="Reply sooner, or raise the daemon's setting callback_timeout.",
        metadata={"step": str(event.step)},
    )

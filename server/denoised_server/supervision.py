"""Supervision: which workers there are, how they are, and that the dead ones come back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import StrEnum

from denoised.errors import DenoisedError, WorkerLostError, WorkersDrainedError

from .background import Background
from .condition import Condition
from .executor import Executor
from .messages import Beat, Heartbeat, Ready, Snapshot, Watch
from .observer import Observer

logger = logging.getLogger(__name__)

SNAPSHOT_SECONDS = 0.2
# Pauses before one restart after another; the last one repeats.
BACKOFF_SECONDS = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
# A worker that has lived this long starts again without a pause.
STABLE_SECONDS = 60.0
# One that was started again more often than this since it was last stable is shown as failed while it is down.
FAILED_ATTEMPTS = 3
BEAT_SECONDS = 1.0
# A drained worker comes back when somebody says so.
DRAINED_RETRY_SECONDS = 5.0


class WorkerState(StrEnum):
    """Where a worker is in its life."""

    STARTING = "starting"
    ACTIVE = "active"
    DRAINING = "draining"
    LOST = "lost"
    FAILED = "failed"


@dataclass(slots=True)
class WorkerRecord:
    """What the front-end knows of one worker.

    `snapshot` is what it reported last in its present life, `attempts` how often it was started again since it was last
    seen stable. One that `is_drained` takes no work, also after it was started again.
    """

    name: str
    ready: Ready
    state: WorkerState = WorkerState.ACTIVE
    snapshot: Snapshot | None = None
    restart_count: int = 0
    start_time: float = field(default_factory=time.monotonic)
    attempts: int = 0
    is_drained: bool = False

    @property
    def free_bytes(self) -> int:
        report = self.snapshot
        return report.budget_bytes - report.weight_bytes - report.reserved_bytes if report else 0


class Supervisor:
    """Starts the workers, restarts those that die, and follows their snapshots.

    A worker that does not beat for `heartbeat_timeout` seconds, or whose engine spends `step_timeout` in one turn,
    hangs and is replaced. `lost` is called with the name of a worker that died before anything else happens,
    `changed` after any change.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        lost: Callable[[str], None],
        changed: Callable[[], None],
        observer: Observer,
        heartbeat_timeout: float = 30.0,
        step_timeout: float = 900.0,
    ) -> None:
        self._executor = executor
        self._lost = lost
        self._changed = changed
        self._observer = observer
        self._heartbeat_timeout = heartbeat_timeout
        self._step_timeout = step_timeout
        self._background = Background()
        self._changes = Condition()
        self._is_draining = False
        self.workers: dict[str, WorkerRecord] = {}

    async def start(self) -> None:
        for name in await self._executor.start():
            self.workers[name] = WorkerRecord(name, self._executor.info(name))
            self._attend(name)
        self._background.spawn(self._supervise(), name="supervision")
        self._note_change()

    async def stop(self) -> None:
        await self._background.stop()
        await self._executor.stop()

    def drain(self) -> None:
        """Shows all workers as taking no more work, and lets the dead ones rest."""
        self._is_draining = True
        for record in self.workers.values():
            if record.state is WorkerState.ACTIVE:
                record.state = WorkerState.DRAINING
        self._note_change()

    def drain_worker(self, name: str) -> None:
        """Shows one worker as taking no more work, until `resume_worker`."""
        self.workers[name].is_drained = True
        if self.workers[name].state is WorkerState.ACTIVE:
            self.workers[name].state = WorkerState.DRAINING
        self._note_change()

    def resume_worker(self, name: str) -> None:
        self.workers[name].is_drained = False
        if self.workers[name].state is WorkerState.DRAINING and not self._is_draining:
            self.workers[name].state = WorkerState.ACTIVE
        self._note_change()

    def recycle(self, name: str) -> None:
        """Ends a worker that has nothing to do, for the memory that it holds; it is started again like any other."""
        record = self.workers[name]
        unaccounted = record.snapshot.memory.unaccounted_bytes if record.snapshot else 0
        logger.warning("%s holds %d bytes that are in no book, and is started anew", name, unaccounted)
        # At once, so that nobody is sent to one that is about to die.
        record.state = WorkerState.LOST
        self._lost(name)
        self._observer.worker_recycled(name)
        self._executor.kill(name)
        self._note_change()

    @property
    def is_drained(self) -> bool:
        """Whether every worker was told to take no more work."""
        return bool(self.workers) and all(record.is_drained for record in self.workers.values())

    @property
    def has_active(self) -> bool:
        return any(record.state is WorkerState.ACTIVE for record in self.workers.values())

    async def wait_for_active(self, patience: float) -> None:
        """Returns once a worker takes work. Raises WorkerLostError when none does in time, and WorkersDrainedError."""
        try:
            async with asyncio.timeout(patience):
                await self._changes.until(lambda: self.has_active or self._is_draining or self.is_drained)
        except TimeoutError:
            raise WorkerLostError(
                "No worker is running; they are being restarted.", hint="Try again shortly.", retry_after=5
            ) from None
        self.check_drained()

    def check_drained(self) -> None:
        if self.is_drained:
            raise WorkersDrainedError(
                "Every worker has been told to take no more work.",
                hint="Send the request to another daemon, or have a worker resume.",
                retry_after=DRAINED_RETRY_SECONDS,
            )

    async def _supervise(self) -> None:
        async for name in self._executor.deaths():
            record = self.workers[name]
            record.state, record.snapshot = _down(record), None
            self._lost(name)
            self._observer.worker_lost(name)
            self._note_change()
            self._background.spawn(self._revive(record), name=f"restart of {name}")

    async def _revive(self, record: WorkerRecord) -> None:
        began = time.monotonic()
        if began - record.start_time > STABLE_SECONDS:
            record.attempts = 0
        while True:
            await asyncio.sleep(BACKOFF_SECONDS[min(record.attempts, len(BACKOFF_SECONDS) - 1)])
            if self._is_draining:
                return
            record.attempts += 1
            record.state = WorkerState.STARTING
            self._note_change()
            try:
                await self._executor.restart(record.name)
                break
            # OSError: the machine had no process or no file to spare.
            except (DenoisedError, OSError) as error:
                logger.error("%s could not be started again: %s", record.name, error)
                record.state = _down(record)
                self._note_change()
        logger.info("%s is back after %.1f s", record.name, time.monotonic() - began)
        record.ready, record.start_time = self._executor.info(record.name), time.monotonic()
        takes_work = not (self._is_draining or record.is_drained)
        record.state = WorkerState.ACTIVE if takes_work else WorkerState.DRAINING
        record.restart_count += 1
        self._observer.worker_restarted(record.name)
        self._note_change()
        self._attend(record.name)

    def _attend(self, name: str) -> None:
        self._background.spawn(self._follow(name), name=f"snapshots of {name}")
        self._background.spawn(self._listen(name), name=f"heart of {name}")

    async def _listen(self, name: str) -> None:
        """Kills a worker whose process or engine hangs; its death does the rest."""
        try:
            async with aclosing(self._executor.submit(name, Beat(BEAT_SECONDS))) as beats:
                while True:
                    async with asyncio.timeout(self._heartbeat_timeout):
                        beat = await anext(beats, None)
                    if beat is None:
                        return
                    if isinstance(beat, Heartbeat) and beat.turn_seconds > self._step_timeout:
                        logger.error("%s has been in one call for %.0f s and is replaced", name, beat.turn_seconds)
                        self._executor.kill(name)
        except TimeoutError:
            logger.error("%s gave no sign of life for %g s and is replaced", name, self._heartbeat_timeout)
            self._executor.kill(name)
        except WorkerLostError:
            logger.debug("%s beats no more", name)

    async def _follow(self, name: str) -> None:
        try:
            async with aclosing(self._executor.submit(name, Watch(SNAPSHOT_SECONDS))) as reports:
                async for report in reports:
                    if isinstance(report, Snapshot):
                        self.workers[name].snapshot = report
                        self._observer.worker_reported(name, report)
                        self._changed()
        except WorkerLostError:
            logger.debug("%s reports no more", name)

    def _note_change(self) -> None:
        self._changes.notify()
        self._changed()


def _down(record: WorkerRecord) -> WorkerState:
    return WorkerState.FAILED if record.attempts > FAILED_ATTEMPTS else WorkerState.LOST

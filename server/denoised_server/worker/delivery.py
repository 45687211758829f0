"""Outputs on their way: each leaves as soon as it is encoded, the last one with the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from denoised_server.messages import Event, Output

from .encoding import Job


class Delivery:
    """Runs the jobs of one request.

    `check` raises when nobody waits any more: what has not been begun is then left out. `emit` takes outputs; `end` is
    called once, with an error or with the last events. `summary` makes the very last, of the seconds that it took.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        check: Callable[[], None],
        emit: Callable[..., None],
        end: Callable[..., None],
        summary: Callable[[float], Event],
    ) -> None:
        self._jobs, self._check, self._emit, self._end, self._summary = jobs, check, emit, end, summary
        self._lock, self._left = threading.Lock(), len(jobs)
        self._error: BaseException | None = None
        self._began = time.perf_counter()

    def run(self) -> None:
        """Does all of it here."""
        outputs: list[Output] = []
        for job in self._jobs:
            outputs += self._attempt(job)
        self._finish(outputs)

    def start(self, pool: Executor) -> None:
        """Has others do it, as many at a time as there are."""
        if not self._jobs:
            self._finish([])
        for job in self._jobs:
            pool.submit(self._run, job)

    def _run(self, job: Job) -> None:
        outputs = self._attempt(job)
        with self._lock:
            self._left -= 1
            if self._left:
                # Within the lock, so that the end does not overtake it.
                if self._error is None:
                    self._emit(*outputs)
                return
        self._finish(outputs)

    def _attempt(self, job: Job) -> list[Output]:
        if self._error is None:
            try:
                self._check()
                return job()
            # Rust libraries panic with more than Exceptions.
            except BaseException as error:
                self._error = error
        return []

    def _finish(self, outputs: Sequence[Output]) -> None:
        if self._error is not None:
            self._end(self._error)
        else:
            self._end(None, *outputs, self._summary(time.perf_counter() - self._began))

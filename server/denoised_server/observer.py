"""What the front-end tells whoever measures it. Does nothing by itself; `metrics` counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .messages import Snapshot


@dataclass(frozen=True, slots=True)
class Course:
    """What a generation came to.

    `outcome` is "ok", "cancelled", or the reason of its error in lower case; `phases` has the seconds that it spent in
    each, of one that ended well.
    """

    repo_id: str
    task: str
    outcome: str
    seconds: float
    steps: int = 0
    images: int = 0
    pixels: int = 0
    phases: Mapping[str, float] = field(default_factory=dict)


class Observer:
    """Each method is told of one kind of event. Durations are in seconds."""

    def request_ended(self, method: str, outcome: str, seconds: float) -> None:
        """A call ended: "ok", "cancelled", or the reason of its error in lower case."""

    def queue_changed(self, worker: str, *, running: int, waiting: int) -> None:
        """The number of generations that a worker runs, or that wait for it, changed."""

    def generation_admitted(self, repo_id: str, queue_seconds: float) -> None:
        """A generation was admitted after waiting so long."""

    def generation_replayed(self) -> None:
        """A generation is run again because its worker died."""

    def generation_ended(self, course: Course) -> None:
        """A generation ended, well or not."""

    def load_ended(self, repo_id: str, outcome: str, seconds: float, phases: Mapping[str, float]) -> None:
        """A load ended: "ok", "cancelled", or the reason of its error in lower case; `phases` by their names."""

    def pipelines_changed(self, counts: Mapping[str, int]) -> None:
        """The number of pipelines by state changed."""

    def pipeline_expired(self) -> None:
        """A pipeline is unloaded because nobody used it."""

    def worker_reported(self, worker: str, snapshot: Snapshot) -> None:
        """A worker said how it is."""

    def worker_lost(self, worker: str) -> None:
        """A worker died."""

    def worker_recycled(self, worker: str) -> None:
        """A worker is ended, to be started again, because of memory that it holds and that is in no book."""

    def worker_restarted(self, worker: str) -> None:
        """A worker that had died is back."""

    def journal_asked(self) -> None:
        """A change is to be written into the journal."""

    def journal_failed(self) -> None:
        """A change could not be written."""

    def journal_answered(self, seconds: float) -> None:
        """A change is on the disk, or could not be written, so long after it was asked for."""

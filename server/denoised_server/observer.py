"""What the front-end tells whoever measures it. Does nothing by itself; `metrics` counts."""

from __future__ import annotations

from collections.abc import Mapping

from .messages import Snapshot


class Observer:
    """Each method is told of one kind of event. Durations are in seconds."""

    def request_ended(self, method: str, outcome: str, seconds: float) -> None:
        """A call ended: "ok", "cancelled", or the reason of its error in lower case."""

    def queue_changed(self, worker: str, *, running: int, waiting: int) -> None:
        """The number of generations that a worker runs, or that wait for it, changed."""

    def admitted(self, queue_seconds: float) -> None:
        """A generation was admitted after waiting so long."""

    def images_made(self, count: int) -> None:
        """So many images were sent to a caller."""

    def load_ended(self, outcome: str, seconds: float) -> None:
        """A load ended: "ok", "cancelled", or the reason of its error in lower case."""

    def pipelines_changed(self, counts: Mapping[str, int]) -> None:
        """The number of pipelines by state changed."""

    def worker_reported(self, worker: str, snapshot: Snapshot) -> None:
        """A worker said how it is."""

    def worker_lost(self, worker: str) -> None:
        """A worker died."""

    def worker_restarted(self, worker: str) -> None:
        """A worker that had died is back."""

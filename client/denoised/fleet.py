"""Several daemons as one: pipelines are spread over them, and built again at another one when theirs is lost."""
# Generated from aio/fleet.py by client/unasync.py: edit that one.

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from .client import Client
from .errors import DaemonUnreachableError, DenoisedError, PipelineNotFoundError, ShuttingDownError
from .pipeline import Pipeline
from .targets import addresses, server_name

# Its daemon is gone, is about to go, or came back without it.
LOST = (DaemonUnreachableError, ShuttingDownError, PipelineNotFoundError)
TRIES = 3


class Fleet:
    """The daemons behind one name. Use it with `with`, or close it.

    Daemons know nothing of each other. The fleet asks them how busy they are, has the least busy one load a pipeline,
    and keeps what it was asked for: when the daemon is lost, another one builds the pipeline again.

    Example:
        with Fleet("dns:///painter-denoised-headless:50051") as fleet:
            pipe = fleet.load("demo", task="text-to-image")
            result = pipe("a red apple")
    """

    def __init__(self, targets: str | Sequence[str], **options: Any) -> None:
        """Connects to nobody yet.

        Args:
            targets: Several targets, as a list or with commas between, or "dns:///host:port" for all addresses of a
                name, which is looked up again for each load. With TLS their certificates are for that name.
            **options: As for `Client`, for each daemon.
        """
        self._targets = targets
        self._options = {"server_name": server_name(targets), **options}
        self._clients: dict[str, Client] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connections. Pipelines stay in their daemons."""
        for client in self._clients.values():
            client.close()

    def load(self, repo_id: str | os.PathLike[str], **arguments: Any) -> FleetPipeline:
        """Loads a pipeline in the least busy daemon.

        Args:
            repo_id: As for `Client.load`.
            **arguments: As for `Client.load`.

        Raises:
            DaemonUnreachableError: No daemon answers.
        """
        pipe = FleetPipeline(self, {"repo_id": repo_id, **arguments}, ())
        pipe.settle()
        return pipe

    def least_busy(self, without: Sequence[str] = ()) -> Client:
        """The daemon that runs and queues the fewest generations for each worker that it has.

        Raises:
            DaemonUnreachableError: None of the others answers.
        """
        found: list[tuple[float, int, Client]] = []
        for target in addresses(self._targets):
            client = self._clients.get(target) or Client(target, **self._options)
            self._clients[target] = client
            if target in without:
                continue
            try:
                if client.is_serving():
                    workers = client.workers()
                    busy = sum(worker.running_count + worker.waiting_count for worker in workers)
                    found.append((busy / len(workers), sum(worker.pipeline_count for worker in workers), client))
            except DenoisedError:
                # It is the others' turn; who asks for nobody else hears of it below.
                continue
        if not found:
            raise DaemonUnreachableError("No daemon of the fleet takes work.", hint="Is the name right?")
        return min(found, key=lambda each: each[:2])[2]


class FleetPipeline:
    """A pipeline in one of the daemons of a fleet; call it as an `Pipeline`.

    A call that was under way when the daemon was lost begins again: give a `seed` to get the image that was coming.
    """

    def __init__(self, fleet: Fleet, load: dict[str, Any], derivations: tuple[dict[str, Any], ...]) -> None:
        self._fleet = fleet
        self._load = load
        self._derivations = derivations
        self._pipe: Pipeline | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `Pipeline.__call__`."""
        return self._use(lambda pipe: pipe(*args, **kwargs))

    def derive(self, task: str, **arguments: Any) -> FleetPipeline:
        """A pipeline for another task from the same weights, in the same daemon; arguments as `Client.derive`."""
        derived = FleetPipeline(self._fleet, self._load, (*self._derivations, {"task": task, **arguments}))
        derived._pipe = self._use(lambda pipe: pipe.client.derive(pipe, task, **arguments))
        return derived

    def settle(self, without: Sequence[str] = ()) -> Pipeline:
        """The pipeline where it is, after it was built there if need be."""
        if self._pipe is None:
            client = self._fleet.least_busy(without)
            pipe = client.load(**self._load)
            for derivation in self._derivations:
                source, pipe = pipe, client.derive(pipe, **derivation)
                source.unload()
            self._pipe = pipe
        return self._pipe

    def unload(self, *, force: bool = False) -> None:
        """Lets go of it, unless its daemon is gone anyway."""
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            try:
                pipe.unload(force=force)
            except LOST:
                return

    def _use(self, use: Callable[[Pipeline], Any]) -> Any:
        lost: list[str] = []
        for _ in range(TRIES - 1):
            pipe = self.settle(lost)
            try:
                return use(pipe)
            except PipelineNotFoundError:
                # The daemon came back without it, and may build it again.
                self._pipe = None
            except (DaemonUnreachableError, ShuttingDownError):
                self._pipe = None
                lost.append(pipe.client.target)
        return use(self.settle(lost))

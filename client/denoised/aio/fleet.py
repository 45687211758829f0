"""Several daemons as one: pipelines are spread over them, and built again at another one when theirs is lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from ..errors import DaemonUnreachableError, DenoisedError, PipelineNotFoundError, ShuttingDownError
from ..targets import addresses, server_name
from .client import AsyncClient
from .pipeline import AsyncPipeline

# Its daemon is gone, is about to go, or came back without it.
LOST = (DaemonUnreachableError, ShuttingDownError, PipelineNotFoundError)
TRIES = 3


class AsyncFleet:
    """The daemons behind one name. Use it with `async with`, or close it.

    Daemons know nothing of each other. The fleet asks them how busy they are, has the least busy one load a pipeline,
    and keeps what it was asked for: when the daemon is lost, another one builds the pipeline again.

    Example:
        async with AsyncFleet("dns:///painter-denoised-headless:50051") as fleet:
            pipe = await fleet.load("demo", task="text-to-image")
            result = await pipe("a red apple")
    """

    def __init__(self, targets: str | Sequence[str], **options: Any) -> None:
        """Connects to nobody yet.

        Args:
            targets: Several targets, as a list or with commas between, or "dns:///host:port" for all addresses of a
                name, which is looked up again for each load. With TLS their certificates are for that name.
            **options: As for `AsyncClient`, for each daemon.
        """
        self._targets = targets
        self._options = {"server_name": server_name(targets), **options}
        self._clients: dict[str, AsyncClient] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connections. Pipelines stay in their daemons."""
        for client in self._clients.values():
            await client.close()

    async def load(self, repo_id: str | os.PathLike[str], **arguments: Any) -> AsyncFleetPipeline:
        """Loads a pipeline in the least busy daemon.

        Args:
            repo_id: As for `AsyncClient.load`.
            **arguments: As for `AsyncClient.load`.

        Raises:
            DaemonUnreachableError: No daemon answers.
        """
        pipe = AsyncFleetPipeline(self, {"repo_id": repo_id, **arguments}, ())
        await pipe.settle()
        return pipe

    async def least_busy(self, without: Sequence[str] = ()) -> AsyncClient:
        """The daemon that runs and queues the fewest generations for each worker that it has.

        Raises:
            DaemonUnreachableError: None of the others answers.
        """
        found: list[tuple[float, int, AsyncClient]] = []
        for target in addresses(self._targets):
            client = self._clients.get(target) or AsyncClient(target, **self._options)
            self._clients[target] = client
            if target in without:
                continue
            try:
                if await client.is_serving():
                    workers = await client.workers()
                    busy = sum(worker.running_count + worker.waiting_count for worker in workers)
                    found.append((busy / len(workers), sum(worker.pipeline_count for worker in workers), client))
            except DenoisedError:
                # It is the others' turn; who asks for nobody else hears of it below.
                continue
        if not found:
            raise DaemonUnreachableError("No daemon of the fleet takes work.", hint="Is the name right?")
        return min(found, key=lambda each: each[:2])[2]


class AsyncFleetPipeline:
    """A pipeline in one of the daemons of a fleet; call it as an `AsyncPipeline`.

    A call that was under way when the daemon was lost begins again: give a `seed` to get the image that was coming.
    """

    def __init__(self, fleet: AsyncFleet, load: dict[str, Any], derivations: tuple[dict[str, Any], ...]) -> None:
        self._fleet = fleet
        self._load = load
        self._derivations = derivations
        self._pipe: AsyncPipeline | None = None

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `AsyncPipeline.__call__`."""
        return await self._use(lambda pipe: pipe(*args, **kwargs))

    async def derive(self, task: str, **arguments: Any) -> AsyncFleetPipeline:
        """A pipeline for another task from the same weights, in the same daemon; arguments as `AsyncClient.derive`."""
        derived = AsyncFleetPipeline(self._fleet, self._load, (*self._derivations, {"task": task, **arguments}))
        derived._pipe = await self._use(lambda pipe: pipe.client.derive(pipe, task, **arguments))
        return derived

    async def settle(self, without: Sequence[str] = ()) -> AsyncPipeline:
        """The pipeline where it is, after it was built there if need be."""
        if self._pipe is None:
            client = await self._fleet.least_busy(without)
            pipe = await client.load(**self._load)
            for derivation in self._derivations:
                source, pipe = pipe, await client.derive(pipe, **derivation)
                await source.unload()
            self._pipe = pipe
        return self._pipe

    async def unload(self, *, force: bool = False) -> None:
        """Lets go of it, unless its daemon is gone anyway."""
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            try:
                await pipe.unload(force=force)
            except LOST:
                return

    async def _use(self, use: Callable[[AsyncPipeline], Any]) -> Any:
        lost: list[str] = []
        for _ in range(TRIES - 1):
            pipe = await self.settle(lost)
            try:
                return await use(pipe)
            except PipelineNotFoundError:
                # The daemon came back without it, and may build it again.
                self._pipe = None
            except (DaemonUnreachableError, ShuttingDownError):
                self._pipe = None
                lost.append(pipe.client.target)
        return await use(await self.settle(lost))

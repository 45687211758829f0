"""Workers as child processes of the front-end, one per device."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from denoised.errors import WorkerLostError

from ..channel import Channel
from ..messages import Command, Event, Ready, WorkerSettings
from .link import Link

logger = logging.getLogger(__name__)

WORKER = "denoised_server.worker.worker:Worker"


class LocalExecutor:
    """Starts workers with multiprocessing and talks to them over pipes."""

    def __init__(
        self,
        workers: Sequence[WorkerSettings],
        *,
        start_timeout: float,
        stop_timeout: float = 5.0,
        worker: str = WORKER,
    ) -> None:
        self._settings = {f"workers/{index}": settings for index, settings in enumerate(workers)}
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        self._worker = worker
        self._links: dict[str, Link] = {}
        self._deaths = Channel[str]()

    async def start(self) -> list[str]:
        try:
            async with asyncio.TaskGroup() as group:
                for name in self._settings:
                    group.create_task(self._launch(name))
        except ExceptionGroup as failures:
            await self.stop()
            raise failures.exceptions[0] from None
        return list(self._settings)

    def submit(self, worker: str, command: Command) -> AsyncGenerator[Event, None]:
        return self._links[worker].submit(command)

    def info(self, worker: str) -> Ready:
        return self._links[worker].ready.result()

    def deaths(self) -> AsyncIterator[str]:
        return self._deaths

    def kill(self, worker: str) -> None:
        self._links[worker].kill()

    async def restart(self, worker: str) -> None:
        await self._links[worker].stop(self._stop_timeout)
        await self._launch(worker)

    async def stop(self) -> None:
        await asyncio.gather(*(link.stop(self._stop_timeout) for link in self._links.values()))
        self._deaths.end()

    async def _launch(self, name: str) -> None:
        link = self._links[name] = Link(name, self._worker, self._settings[name], died=self._deaths.put)
        try:
            async with asyncio.timeout(self._start_timeout):
                await link.start()
                ready = await asyncio.shield(link.ready)
        except BaseException as error:
            await link.stop(0)
            if isinstance(error, TimeoutError):
                raise WorkerLostError(
                    f"{name} was not ready after {self._start_timeout:g} s.",
                    hint="Raise the setting start_timeout if the machine is slow.",
                ) from None
            raise
        logger.info("%s is ready: process %d on %s", name, ready.pid, ready.device)

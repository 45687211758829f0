"""Where workers run.

An executor starts workers and carries commands to them. Everything else, from queues to memory, is decided before a
command gets here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Protocol

from ..messages import Command, Event, Ready


class Executor(Protocol):
    """Starts workers and carries commands to them."""

    async def start(self) -> list[str]:
        """Starts the workers and returns their names, "workers/0" and so on, once every one of them is ready.

        Raises what a worker raised while it came up, or WorkerLostError when one died or took too long; then none is
        left running.
        """
        ...

    def submit(self, worker: str, command: Command) -> AsyncGenerator[Event, None]:
        """Sends a command and yields its events.

        Closing the generator cancels the command. Raises what the command raised, or WorkerLostError when the worker
        died. Commands and their cancellations arrive in the order in which they were sent.
        """
        ...

    def info(self, worker: str) -> Ready:
        """What the worker said when it came up."""
        ...

    def deaths(self) -> AsyncIterator[str]:
        """Yields the name of each worker that dies, at once; ends when the executor stops. For one reader."""
        ...

    def kill(self, worker: str) -> None:
        """Ends a worker that does not answer any more, by force and at once; its death is told of as any other."""
        ...

    async def restart(self, worker: str) -> None:
        """Starts a worker that died again, under the same name; raises as `start`."""
        ...

    async def stop(self) -> None:
        """Stops every worker. What they were running fails with WorkerLostError."""
        ...

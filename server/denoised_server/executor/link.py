"""The front-end's end of one worker process: its pipes, its threads and who waits for what."""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import os
import queue
import selectors
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection

from denoised.errors import WorkerLostError

from ..channel import Channel
from ..messages import Command, Done, End, Event, Failed, Ready, WorkerSettings
from .child import HANDSHAKE, serve

logger = logging.getLogger(__name__)

# A lost worker is started again at once, so another try soon finds one.
RETRY_SECONDS = 1.0
# How long a process may take from closing its pipe to being gone.
EXIT_SECONDS = 1.0


class Link:
    """One run of a worker, from its start to its death.

    A thread writes to the process and another one reads from it: a worker that has stopped fills its pipe, and a write
    would then hold up the event loop.
    """

    def __init__(self, name: str, worker: str, settings: WorkerSettings, *, died: Callable[[str], None]) -> None:
        self.name = name
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._died = died
        self._loop = asyncio.get_running_loop()
        self._stopping = False
        self._gone = asyncio.Event()
        self._numbers = itertools.count(HANDSHAKE + 1)
        self._waiting: dict[int, Channel[Event]] = {}
        self._outbox: queue.SimpleQueue[tuple[int, Command | None] | None] = queue.SimpleQueue()
        context = multiprocessing.get_context("spawn")
        theirs, commands = context.Pipe(duplex=False)
        events, ours = context.Pipe(duplex=False)
        self._process = context.Process(
            target=serve, args=(worker, settings, theirs, ours), name=f"denoised {name}", daemon=True
        )
        try:
            self._process.start()
        except BaseException:
            for end in (theirs, commands, events, ours):
                end.close()
            raise
        # Closes our copies of the worker's ends: otherwise a dead worker never looks like the end of the pipe.
        theirs.close()
        ours.close()
        self._threads = [
            threading.Thread(target=self._write, args=(commands,), name=f"to {name}", daemon=True),
            threading.Thread(target=self._read, args=(events,), name=f"from {name}", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    async def submit(self, command: Command) -> AsyncGenerator[Event, None]:
        if self._gone.is_set() or self._stopping:
            raise self._lost()
        number = next(self._numbers)
        events = self._waiting[number] = Channel()
        self._outbox.put((number, command))
        try:
            async for event in events:
                yield event
        finally:
            if self._waiting.pop(number, None) is not None:
                self._outbox.put((number, None))

    async def stop(self, grace: float) -> None:
        """Ends the process, by force if it has not gone after so many seconds."""
        self._stopping = True
        self._outbox.put(None)
        try:
            async with asyncio.timeout(grace):
                await self._gone.wait()
        except TimeoutError:
            self._process.kill()
            await self._gone.wait()
        await asyncio.to_thread(self._join)

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _write(self, pipe: Connection) -> None:
        with pipe:
            while (item := self._outbox.get()) is not None:
                try:
                    pipe.send(item)
                except OSError:
                    return

    def _read(self, pipe: Connection) -> None:
        with ExitStack() as stack:
            stack.enter_context(pipe)
            selector = stack.enter_context(selectors.DefaultSelector())
            selector.register(pipe, selectors.EVENT_READ)
            if sys.platform == "linux" and self._process.pid:
                # A process that the worker has forked may hold the pipe open; the death itself cannot be hidden.
                exit_file = os.pidfd_open(self._process.pid)
                stack.callback(os.close, exit_file)
                selector.register(exit_file, selectors.EVENT_READ)
            try:
                while any(key.fileobj is pipe for key, _ in selector.select()):
                    self._loop.call_soon_threadsafe(self._deliver, *pipe.recv())
            except (EOFError, OSError):
                pass
        self._process.join(timeout=EXIT_SECONDS)
        self._process.kill()
        self._process.join()
        self._outbox.put(None)
        self._loop.call_soon_threadsafe(self._lose)

    def _deliver(self, number: int, event: Event | End | Ready) -> None:
        if number == HANDSHAKE:
            if self.ready.done():
                return
            if isinstance(event, Failed):
                self.ready.set_exception(event.error)
            elif isinstance(event, Ready):
                self.ready.set_result(event)
        elif isinstance(event, Done | Failed):
            if (events := self._waiting.pop(number, None)) is not None:
                events.end(event.error if isinstance(event, Failed) else None)
        elif not isinstance(event, Ready) and (events := self._waiting.get(number)) is not None:
            events.put(event)

    def _lose(self) -> None:
        """Tells whoever cares first, so that nobody who is told next sends the dead worker more."""
        self._gone.set()
        if not self.ready.done():
            self.ready.set_exception(self._lost())
            # Whoever started it may have stopped waiting.
            self.ready.exception()
        elif not self._stopping:
            logger.warning("%s", self._lost().message)
            self._died(self.name)
        for events in self._waiting.values():
            events.end(self._lost())
        self._waiting.clear()

    def _lost(self) -> WorkerLostError:
        code = None if self._stopping else self._process.exitcode
        how = "" if code is None else f" by signal {-code}" if code < 0 else f" with exit code {code}"
        return WorkerLostError(f"{self.name} ended{how}.", hint="Send the request again.", retry_after=RETRY_SECONDS)

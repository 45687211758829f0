"""The front-end's end of one worker process: its socket, its death and who waits for what."""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import os
import socket
import sys
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from denoised import traces
from denoised.errors import WorkerLostError

from .. import request_context
from ..channel import Channel
from ..messages import Command, Done, End, Event, Failed, Ready, WorkerSettings
from ..request_context import RequestContext
from .child import HANDSHAKE, serve
from .frames import Frames, pack

logger = logging.getLogger(__name__)

# A lost worker is started again at once, so another try soon finds one.
RETRY_SECONDS = 1.0
# How long a process may take from closing its socket to being gone.
EXIT_SECONDS = 1.0
# How long what a dead process has sent may take to be read.
LAST_WORDS_SECONDS = 0.1


class Link:
    """One run of a worker, from its start to its death.

    The event loop itself reads and writes: commands and events are small or written in one piece, and what a worker
    that has stopped does not take waits in memory.
    """

    def __init__(self, name: str, worker: str, settings: WorkerSettings, *, died: Callable[[str], None]) -> None:
        self.name = name
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[Ready] = self._loop.create_future()
        self._died = died
        self._stopping = False
        self._disconnected, self._gone = asyncio.Event(), asyncio.Event()
        self._numbers = itertools.count(HANDSHAKE + 1)
        self._waiting: dict[int, Channel[Event]] = {}
        self._ours, self._theirs = socket.socketpair()
        self._process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(worker, settings, self._theirs), name=f"denoised {name}", daemon=True
        )
        self._transport: asyncio.Transport
        self._exit_code: int | None = None
        self._burial: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the process; `ready` says when it is up."""
        # Closes our copy of the worker's end: otherwise a dead worker never looks like the end of the stream.
        with self._theirs:
            self._transport, _ = await self._loop.create_connection(
                lambda: Frames(lambda message: self._deliver(*message), self._disconnected.set), sock=self._ours
            )
            try:
                self._process.start()
            except BaseException:
                self._transport.abort()
                raise
        self._burial = asyncio.create_task(self._bury(), name=f"end of {self.name}")

    async def submit(self, command: Command) -> AsyncGenerator[Event, None]:
        if self._burial is None or self._gone.is_set() or self._stopping:
            raise self._lost()
        number = next(self._numbers)
        events = self._waiting[number] = Channel()
        request = replace(request_context.current(), worker=self.name, trace=traces.carry())
        self._send(number, command, request)
        try:
            async for event in events:
                yield event
        finally:
            if self._waiting.pop(number, None) is not None:
                self._send(number, None, None)

    def kill(self) -> None:
        """Ends the process at once, also one that has stopped."""
        # Where it has disconnected, the thread that buries it has it.
        if not self._disconnected.is_set():
            self._process.kill()

    async def stop(self, grace: float) -> None:
        """Ends the process, by force if it has not gone after so many seconds."""
        self._stopping = True
        if self._burial is None:
            return
        if not self._transport.is_closing():
            self._transport.write_eof()
        try:
            async with asyncio.timeout(grace):
                await self._gone.wait()
        except TimeoutError:
            self.kill()
        await self._burial

    def _send(self, number: int, command: Command | None, request: RequestContext | None) -> None:
        if self._stopping or self._transport.is_closing():
            return
        # In one piece, so that it wakes the worker once.
        self._transport.writelines(pack((number, command, request)))

    async def _bury(self) -> None:
        """Waits for the process to end and for its last words; then tells those who wait for more."""
        if sys.platform == "linux" and self._process.pid:
            # A process that the worker has forked may hold the socket open; the death itself cannot be hidden.
            exit_file = os.pidfd_open(self._process.pid)
            self._loop.add_reader(exit_file, self._exited, exit_file)
        await self._disconnected.wait()
        await asyncio.to_thread(self._reap)
        self._transport.abort()
        self._lose()

    def _exited(self, exit_file: int) -> None:
        self._loop.remove_reader(exit_file)
        os.close(exit_file)
        self._loop.call_later(LAST_WORDS_SECONDS, self._disconnected.set)

    def _reap(self) -> None:
        self._process.join(timeout=EXIT_SECONDS)
        self._process.kill()
        self._process.join()
        self._exit_code = self._process.exitcode
        # Its pipes would stay open until the garbage collector comes by.
        self._process.close()

    def _deliver(self, number: int, *events: Event | End | Ready) -> None:
        for event in events:
            self._take(number, event)

    def _take(self, number: int, event: Event | End | Ready) -> None:
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
        code = None if self._stopping else self._exit_code
        how = "" if code is None else f" by signal {-code}" if code < 0 else f" with exit code {code}"
        return WorkerLostError(f"{self.name} ended{how}.", hint="Send the request again.", retry_after=RETRY_SECONDS)

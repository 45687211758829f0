"""What runs in a worker's process: commands in, events out, until the pipe ends."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Protocol

from denoised.errors import DenoisedError, InternalError

from .. import logs
from ..messages import Command, End, Event, Failed, Ready, WorkerSettings

logger = logging.getLogger(__name__)

# The handshake travels like the events of a command with this number.
HANDSHAKE = 0
# A worker in the middle of a long computation is not worth waiting for.
CLOSE_SECONDS = 3.0

Emit = Callable[[Event | End], None]


class Worker(Protocol):
    """What an executor runs, constructed with WorkerSettings in a process of its own."""

    def ready(self) -> Ready: ...

    def submit(self, number: int, command: Command, emit: Emit) -> None:
        """Begins a command and returns at once. `emit` may be called from any thread; the last event is an End."""

    def cancel(self, number: int) -> None: ...

    def close(self) -> None: ...


def serve(worker: str, settings: WorkerSettings, commands: Connection, events: Connection) -> None:
    """Runs the worker named "module:Class"."""
    # A terminal and most supervisors signal the whole group; when to stop is for the front-end to say, by the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logs.set_up(verbose=settings.verbose)
    outbox = _Outbox(events)
    try:
        module, _, name = worker.partition(":")
        # Here, so that the front-end never imports torch.
        running: Worker = getattr(importlib.import_module(module), name)(settings)
        outbox.send(HANDSHAKE, running.ready())
    except DenoisedError as error:
        outbox.send(HANDSHAKE, Failed(error))
        return
    except Exception:
        logger.exception("the worker for %s could not start", settings.device)
        sys.exit(1)
    _follow(commands, running, outbox)
    timer = threading.Timer(CLOSE_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()
    running.close()
    # Not by returning: threads deep in a computation would be waited for.
    os._exit(0)


def _follow(commands: Connection, worker: Worker, outbox: _Outbox) -> None:
    while True:
        try:
            number, command = commands.recv()
        except (EOFError, OSError):
            return
        if command is None:
            worker.cancel(number)
            continue
        try:
            worker.submit(number, command, partial(outbox.send, number))
        except Exception as error:
            outbox.send(number, Failed(error))


class _Outbox:
    """Our end of the pipe that events leave by."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def send(self, number: int, event: Event | End | Ready) -> None:
        if isinstance(event, Failed) and not isinstance(event.error, DenoisedError):
            # Anything may be in a foreign exception: classes the front-end cannot import, tensors, whole frames.
            logger.error("a command failed", exc_info=event.error)
            event = Failed(
                InternalError("The worker failed in a way it should not.", hint="The daemon's log has the rest.")
            )
        data = ForkingPickler.dumps((number, event))
        try:
            with self._lock:
                self._pipe.send_bytes(data)
        except OSError:
            # The front-end is gone; the main thread sees it too and ends the process.
            logger.debug("an event found no reader")

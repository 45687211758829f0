"""What runs in a worker's process: commands in, events out, until the front-end ends."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import sys
import threading
from functools import partial
from typing import Protocol

from denoised import traces
from denoised.errors import DenoisedError, InternalError

from .. import logs, request_context
from ..messages import Command, End, Event, Failed, Ready, WorkerSettings
from .frames import pack, receive

logger = logging.getLogger(__name__)

# The handshake travels like the events of a command with this number.
HANDSHAKE = 0
# A worker in the middle of a long computation is not worth waiting for.
CLOSE_SECONDS = 3.0


class Emit(Protocol):
    """Takes events of one command, from any thread; several at once travel as one message."""

    def __call__(self, *events: Event | End) -> None: ...


class Worker(Protocol):
    """What an executor runs, constructed with WorkerSettings in a process of its own."""

    def ready(self) -> Ready: ...

    def submit(self, number: int, command: Command, emit: Emit) -> None:
        """Begins a command and returns at once. The last event is an End.

        `request_context.current()` is the request that it is for, until this returns.
        """

    def cancel(self, number: int) -> None: ...

    def close(self) -> None: ...


def serve(worker: str, settings: WorkerSettings, front_end: socket.socket) -> None:
    """Runs the worker named "module:Class"."""
    # A terminal and most supervisors signal the whole group; when to stop is for the front-end to say, by the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logs.set_up(verbose=settings.verbose, log_format=settings.log_format)
    send_traces = traces.set_up("denoised-worker")
    outbox = _Outbox(front_end)
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
    _follow(front_end, running, outbox)
    timer = threading.Timer(CLOSE_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()
    running.close()
    send_traces()
    # Not by returning: threads deep in a computation would be waited for.
    os._exit(0)


def _follow(front_end: socket.socket, worker: Worker, outbox: _Outbox) -> None:
    try:
        for number, command, request in receive(front_end):
            if command is None:
                worker.cancel(number)
                continue
            try:
                with request_context.use(request):
                    worker.submit(number, command, partial(outbox.send, number))
            except Exception as error:
                outbox.send(number, Failed(error))
    except OSError:
        return


class _Outbox:
    """Our end of the socket, for events to leave by."""

    def __init__(self, front_end: socket.socket) -> None:
        self._front_end = front_end
        self._lock = threading.Lock()

    def send(self, number: int, *events: Event | End | Ready) -> None:
        try:
            pieces = pack((number, *map(_presentable, events)))
        except TypeError as error:
            logger.error("an event could not be sent: %s", error)
            pieces = pack((number, Failed(_bug())))
        try:
            with self._lock:
                sent = self._front_end.sendmsg(pieces)
                for piece in pieces:
                    if sent < len(piece):
                        self._front_end.sendall(memoryview(piece)[sent:])
                    sent = max(0, sent - len(piece))
        except OSError:
            # The front-end is gone; the main thread sees it too and ends the process.
            logger.debug("an event found no reader")


def _presentable(event: Event | End | Ready) -> Event | End | Ready:
    if not isinstance(event, Failed) or isinstance(event.error, DenoisedError):
        return event
    # Anything may be in a foreign exception: classes the front-end cannot import, tensors, whole frames.
    logger.error("a command failed", exc_info=event.error)
    return Failed(_bug())


def _bug() -> InternalError:
    return InternalError("The worker failed in a way it should not.", hint="The daemon's log has the rest.")

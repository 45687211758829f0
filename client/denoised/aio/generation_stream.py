"""Events of one generation, over lost connections and a daemon that is started again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from ..errors import DaemonUnreachableError, GenerationNotFoundError, ShuttingDownError
from ..patience import ANSWER_SECONDS, Patience
from ..units import to_duration
from ..v1 import generation_service_pb2 as pb
from .stream import AsyncStream


class AsyncGenerationStream:
    """Each step and each output of a generation once. Leaving the iteration ends the generation, if it is not detached.

    A connection that is lost is made again: the generation is resumed after the last event, or run again with the same
    seeds where the daemon has ended it. `async for event in stream` raises a DenoisedError when that does not help.
    """

    def __init__(
        self,
        start: Callable[[Callable[[Any], Any], Any, float | None], AsyncStream[Any]],
        request: pb.GenerateRequest | None,
        *,
        name: str = "",
        timeout: float | None = None,
    ) -> None:
        self._start = start
        self._request = request
        self._name = name
        self._is_accepted = bool(name)
        self._after = 0
        self._seen: set[tuple[Any, ...]] = set()
        self._completed_steps = 0
        self._timeout = timeout
        # One that goes on without its caller is not ended by the caller's patience.
        self._limits = (
            request is not None and not request.HasField("timeout") and request.on_disconnect != pb.ON_DISCONNECT_DETACH
        )

    async def __aiter__(self) -> AsyncGenerator[pb.GenerateResponse, None]:
        patience, began, is_over = Patience(), time.monotonic(), False
        while not is_over:
            left = None if self._timeout is None else max(0.001, self._timeout - (time.monotonic() - began))
            try:
                async with contextlib.aclosing(aiter(self._open(left))) as events:
                    async for message in events:
                        event = message.event if isinstance(message, pb.ResumeGenerationResponse) else message
                        patience.renew()
                        if self._is_new(event):
                            yield event
                is_over = True
            except (DaemonUnreachableError, ShuttingDownError) as error:
                is_late = self._timeout is not None and time.monotonic() - began >= self._timeout
                if is_late or not self._is_accepted:
                    # Its time is over, or nothing was promised yet: whoever calls had better know at once.
                    raise
                await asyncio.sleep(patience.pause(error))
            except GenerationNotFoundError:
                if self._request is None or not self._name:
                    raise
                # The daemon has ended it, or has ended itself.
                self._name, self._after = "", 0

    def _open(self, timeout: float | None) -> AsyncStream[Any]:
        if self._name:
            request = pb.ResumeGenerationRequest(name=self._name, after_sequence=self._after)
            return self._start(lambda stubs: stubs.generations.ResumeGeneration, request, timeout)
        if timeout is not None and self._request is not None and self._limits:
            # The daemon keeps the time: it says where the generation stood when that ran out.
            self._request.timeout.CopyFrom(to_duration(timeout))
            timeout += ANSWER_SECONDS
        return self._start(lambda stubs: stubs.generations.Generate, self._request, timeout)

    def _is_new(self, event: pb.GenerateResponse) -> bool:
        self._after = max(self._after, event.sequence)
        match event.WhichOneof("event"):
            case "started":
                is_first = ("started",) not in self._seen
                self._seen.add(("started",))
                self._name, self._is_accepted = event.started.name, True
                if self._request is not None and not self._request.sampling.generators:
                    # Run again, it makes the same.
                    del self._request.sampling.seeds[:]
                    self._request.sampling.seeds.extend(event.started.seeds)
                return is_first
            case "queued":
                return not self._completed_steps
            case "progress":
                is_next = event.progress.completed_steps > self._completed_steps
                self._completed_steps = max(self._completed_steps, event.progress.completed_steps)
                return is_next
            case "output":
                key = (
                    event.output.field,
                    event.output.group if event.output.HasField("group") else None,
                    event.output.index,
                )
                is_first = key not in self._seen
                self._seen.add(key)
                return is_first
        return True

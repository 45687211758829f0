"""Events of one load, over lost connections and a daemon that is started again."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Any

from ..errors import DaemonUnreachableError, ShuttingDownError
from ..patience import Patience
from ..v1 import pipeline_service_pb2 as pb
from .stream import AsyncStream


class AsyncLoadStream:
    """The progress of a load, and then the pipeline. Leaving the iteration ends the load, soon.

    The request gets a request_id: one whose connection is lost is sent again and joins the load that goes on.
    """

    def __init__(
        self,
        start: Callable[[Callable[[Any], Any], Any, float | None], AsyncStream[Any]],
        request: pb.LoadPipelineRequest,
        timeout: float | None,
    ) -> None:
        self._start = start
        self._request = request
        self._timeout = timeout

    async def __aiter__(self) -> AsyncGenerator[pb.LoadPipelineResponse, None]:
        self._request.request_id = self._request.request_id or str(uuid.uuid4())
        patience, began, is_accepted = Patience(), time.monotonic(), False
        while True:
            left = None if self._timeout is None else max(0.001, self._timeout - (time.monotonic() - began))
            stream = self._start(lambda stubs: stubs.pipelines.LoadPipeline, self._request, left)
            try:
                async with contextlib.aclosing(aiter(stream)) as events:
                    async for event in events:
                        is_accepted = True
                        patience.renew()
                        yield event
                return
            except (DaemonUnreachableError, ShuttingDownError) as error:
                is_late = self._timeout is not None and time.monotonic() - began >= self._timeout
                if is_late or not is_accepted:
                    # Its time is over, or nothing was promised yet: whoever calls had better know at once.
                    raise
                await asyncio.sleep(patience.pause(error))

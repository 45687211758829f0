"""The request that work is done for, for log lines and traces to say. It goes along to the worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from denoised.traces import Carrier


@dataclass(slots=True)
class RequestContext:
    """Filled in by whoever gets to know more; `trace` carries the span to go on from."""

    request_id: str = ""
    pipeline_class: str = ""
    worker: str = ""
    trace: Carrier = field(default_factory=dict)


_current: ContextVar[RequestContext] = ContextVar("request_context")


def begin(request_id: str) -> None:
    """All that this task and those it starts do from now on is for that request."""
    _current.set(RequestContext(request_id))


def current() -> RequestContext:
    """An empty one where work is done for no request."""
    return _current.get(None) or RequestContext()


@contextmanager
def use(request: RequestContext) -> Iterator[None]:
    """What the block does is for that request, whatever thread it is on."""
    token = _current.set(request)
    try:
        yield
    finally:
        _current.reset(token)

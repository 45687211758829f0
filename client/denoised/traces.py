"""Traces, where OpenTelemetry is installed (the extra `otel`): spans, and their context on its way to who works next.

Without it, or where nobody has set a tracer provider, all of this does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

try:
    from opentelemetry import context, propagate, trace
except ImportError:
    IS_INSTALLED = False
else:
    IS_INSTALLED = True

SERVICE = "denoised"
# Any of these says that traces are wanted, and where; the exporter reads them, and others of the standard, by itself.
VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER")

Carrier = Mapping[str, str]


def set_up(service: str) -> Callable[[], None]:
    """Sends this process's spans where the environment's OTEL_* variables say. Returns what sends the last of them."""
    if not IS_INSTALLED or not any(map(os.environ.get, VARIABLES)) or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return _nothing
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME", service)
    provider = TracerProvider(resource=Resource.create({"service.name": name}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return provider.shutdown


def _is_on() -> bool:
    return IS_INSTALLED and not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def _nothing() -> None:
    pass


@contextmanager
def calling(method: str) -> Iterator[Sequence[tuple[str, str]]]:
    """Spans a call to a daemon. Gives the metadata that carries the span there.

    The span is not the current one: whoever iterates a stream does other things in between.
    """
    if not _is_on():
        yield ()
        return
    span = trace.get_tracer(SERVICE).start_span(f"denoised.{method}", kind=trace.SpanKind.CLIENT)
    headers: dict[str, str] = {}
    propagate.inject(headers, trace.set_span_in_context(span))
    with _ending(span):
        yield tuple(headers.items())


@contextmanager
def serving(method: str, metadata: Sequence[tuple[str, str | bytes]]) -> Iterator[None]:
    """Spans the answer to a call, and all that its task does from now on."""
    if not _is_on():
        yield
        return
    parent = propagate.extract({key: value for key, value in metadata if isinstance(value, str)})
    span = trace.get_tracer(SERVICE).start_span(f"serve {method}", parent, kind=trace.SpanKind.SERVER)
    # Never detached: a call has a task of its own, and its context ends with it.
    context.attach(trace.set_span_in_context(span, parent))
    with _ending(span):
        yield


@contextmanager
def span(name: str, carrier: Carrier | None = None, **attributes: str | int | float) -> Iterator[None]:
    """Spans the block, under the current span or under the one that was carried here."""
    if not _is_on():
        yield
        return
    parent = propagate.extract(carrier) if carrier is not None else None
    with _ending(trace.get_tracer(SERVICE).start_span(name, parent, attributes=attributes)):
        yield


def record(name: str, carrier: Carrier, start_time: float, end_time: float, **attributes: str | int | float) -> None:
    """Adds a span of the past, with times in seconds since the epoch."""
    if _is_on():
        started, ended = int(start_time * 1e9), int(end_time * 1e9)
        tracer = trace.get_tracer(SERVICE)
        tracer.start_span(name, propagate.extract(carrier), attributes=attributes, start_time=started).end(ended)


def carry() -> Carrier:
    """The current span, for another process to go on from."""
    carrier: dict[str, str] = {}
    if _is_on():
        propagate.inject(carrier)
    return carrier


def trace_id() -> str:
    """That of the current span; empty where there is none, or where it is not kept."""
    if _is_on() and (current := trace.get_current_span().get_span_context()).trace_flags.sampled:
        return trace.format_trace_id(current.trace_id)
    return ""


@contextmanager
def _ending(span: Any) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        reason = getattr(error, "reason", "") or type(error).__name__
        span.set_attribute("error.type", reason)
        # Leaving a call early is no error.
        if isinstance(error, Exception):
            span.set_status(trace.StatusCode.ERROR, reason)
        raise
    finally:
        span.end()

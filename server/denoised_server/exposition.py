"""Answers Prometheus over HTTP, in its own format or in OpenMetrics, as it asks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment


class MetricsServer:
    """Serves the metrics of a registry, on a thread of its own."""

    def __init__(self, registry: CollectorRegistry, *, host: str, port: int) -> None:
        self._server: WSGIServer
        self._thread: threading.Thread
        self._server, self._thread = start_http_server(port, host, registry)
        self._metrics = make_wsgi_app(registry)

    def probe(self, answer: Callable[[str], tuple[int, str] | None]) -> None:
        """Answers paths of probes too: `answer` returns a status and a text, or None for what is no probe's."""

        def serve(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            found = answer(str(environ.get("PATH_INFO", "")))
            if found is None:
                page: Iterable[bytes] = self._metrics(environ, start_response)
                return page
            status, text = found
            start_response(f"{status} {HTTPStatus(status).phrase}", [("Content-Type", "text/plain; charset=utf-8")])
            return [text.encode()]

        self._server.set_app(serve)

    @property
    def port(self) -> int:
        return self._server.server_port

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

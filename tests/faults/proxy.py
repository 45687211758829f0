"""A relay between a client and a daemon, which can lose its connections, also without a word."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any

import pytest
from denoised import channel

from tests.faults.victim import free_port

# gRPC pings no faster.
KEEPALIVE = {
    "grpc.keepalive_time_ms": 10_000,
    "grpc.keepalive_timeout_ms": 2_000,
    "grpc.http2.ping_timeout_ms": 2_000,
}


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has clients notice sooner that a connection is dead."""
    usual = channel.channel_options

    def options(*given: Any) -> list[tuple[str, Any]]:
        asked = dict(usual(*given))
        assert set(asked) >= set(KEEPALIVE), "only sooner"
        return list((asked | KEEPALIVE).items())

    monkeypatch.setattr("denoised.client.channel_options", options)


class Proxy:
    """Use it with `with`. `silence` strands the connections that there are, as a lost cable does; new ones work."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", free_port()))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._cut = threading.Event()
        self._sockets: list[socket.socket] = [self._listener]

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def silence(self) -> None:
        self._cut.set()
        self._cut = threading.Event()

    def drop(self) -> None:
        """Closes the connections that there are."""
        for each in self._sockets[1:]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                daemon = socket.create_connection(self._target)
                self._sockets += [client, daemon]
                for source, sink in ((client, daemon), (daemon, client)):
                    threading.Thread(target=self._relay, args=(source, sink, self._cut), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, cut: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if cut.is_set():
                    continue
                sink.sendall(data)
            if not cut.is_set():
                sink.shutdown(socket.SHUT_WR)

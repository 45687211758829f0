"""The addresses that a name stands for, and the name that their certificates are for."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from .channel import resolve_target
from .errors import DaemonUnreachableError

DNS = "dns:///"


def addresses(targets: str | Sequence[str]) -> list[str]:
    """One target for each daemon: those that are listed, or all addresses of "dns:///host:port" as they are now."""
    if not isinstance(targets, str):
        return [resolve_target(target) for target in targets]
    if not targets.startswith(DNS):
        return [resolve_target(part.strip()) for part in targets.split(",")]
    host, port = _split(targets)
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise DaemonUnreachableError(f"{host} stands for no address: {error.strerror}.") from error
    # Sorted, so that every client sees the daemons in one order; a name may have an address twice.
    hosts = sorted({str(address[4][0]) for address in found})
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts]


def server_name(targets: str | Sequence[str]) -> str | None:
    """The name that the certificates are for when `addresses` has resolved it away; else each target is its own."""
    return _split(targets)[0] if isinstance(targets, str) and targets.startswith(DNS) else None


def _split(target: str) -> tuple[str, str]:
    host, _, port = resolve_target(target.removeprefix(DNS)).rpartition(":")
    return host.strip("[]"), port

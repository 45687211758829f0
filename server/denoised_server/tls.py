"""TLS: certificates from files, taken up again when the files change."""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

logger = logging.getLogger(__name__)


class CertificateError(Exception):
    """The files cannot be used; the text says why."""


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """PEM files. With `client_ca`, only clients with a certificate signed by one of its authorities get in."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials that follow the files. Raises CertificateError when they cannot be used at first."""
        following = _Following(self)
        # Its stubs do not know that it may be told that nothing changed.
        latest: Any = following.latest
        return grpc.dynamic_ssl_server_credentials(
            following.first, latest, require_client_authentication=self.client_ca is not None
        )


class _Following:
    """Reads the files again when they change. Each handshake asks, on a thread of gRPC's."""

    def __init__(self, files: CertificateFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._seen = self._state()
        self.first = self._read()

    def latest(self) -> grpc.ServerCertificateConfiguration | None:
        """The configuration when it is another than before, else None, which to gRPC means the same as before."""
        with self._lock:
            if (state := self._state()) == self._seen:
                return None
            # Seen also when it cannot be used: half of a rotation is written, and the other half changes it again.
            self._seen = state
            try:
                configuration = self._read()
            except CertificateError as error:
                logger.error("%s The certificate from before stays in use.", error)
                return None
            logger.info("the certificate changed and is in use from now on")
            return configuration

    def _read(self) -> grpc.ServerCertificateConfiguration:
        files = self._files
        try:
            # gRPC takes anything, and then refuses every handshake without saying why.
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(files.cert, files.key, password="")
            if files.client_ca is not None:
                context.load_verify_locations(files.client_ca)
            return grpc.ssl_server_certificate_configuration(
                [(files.key.read_bytes(), files.cert.read_bytes())],
                root_certificates=files.client_ca.read_bytes() if files.client_ca is not None else None,
            )
        except ssl.SSLError:
            raise CertificateError(
                "tls_cert, tls_key or tls_client_ca is no PEM file, or the key is not that of the certificate."
            ) from None
        except OSError as error:
            raise CertificateError(f"tls_cert, tls_key or tls_client_ca cannot be read: {error.strerror}.") from None

    def _state(self) -> tuple[tuple[int, ...], ...]:
        paths = (self._files.cert, self._files.key, self._files.client_ca)
        return tuple(_state_of(path) for path in paths if path is not None)


def _state_of(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns

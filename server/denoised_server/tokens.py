"""Tokens: what clients show to be let in, and what the daemon keeps of them, which is no use to a thief."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .callers import Caller, Quota, Scope

logger = logging.getLogger(__name__)

# Found by tools that look for secrets in places where they should not be.
SECRET_PREFIX = "denoised_"
SECRET_BYTES = 32
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class TokenFileError(Exception):
    """The file cannot be used; the text says why."""


@dataclass(frozen=True, slots=True)
class Token:
    """One client. `digest` is the SHA-256 of its secret; `certificate` the common name of its certificate under mTLS.

    Either may be empty. A secret has 256 random bits, so a plain digest of it cannot be reversed by guessing.
    """

    name: str
    scopes: frozenset[Scope]
    digest: str = ""
    certificate: str = ""
    quota: Quota = field(default_factory=Quota)

    @property
    def caller(self) -> Caller:
        return Caller(self.name, self.scopes, self.quota)


def new_secret() -> str:
    return SECRET_PREFIX + secrets.token_urlsafe(SECRET_BYTES)


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def find(tokens: Iterable[Token], secret: str) -> Token | None:
    """The token of this secret. Takes the same time whichever it is, and whether there is one."""
    shown, found = digest(secret).encode(), None
    for token in tokens:
        if hmac.compare_digest(shown, token.digest.encode()):
            found = token
    return found


def find_certificate(tokens: Iterable[Token], common_name: str) -> Token | None:
    """The token that a client certificate stands for; gRPC has checked the certificate."""
    return next((token for token in tokens if token.certificate and token.certificate == common_name), None)


def read(path: Path) -> list[Token]:
    """Raises TokenFileError."""
    try:
        data = json.loads(path.read_text())
        tokens = [_parse(entry) for entry in data["tokens"]]
    except OSError as error:
        raise TokenFileError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TokenFileError(f"{path} is no file of tokens: {error}.") from None
    for key in ("name", "digest", "certificate"):
        values = [value for token in tokens if (value := getattr(token, key))]
        if len(set(values)) < len(values):
            raise TokenFileError(f"{path} has two tokens with the same {key}.")
    return tokens


def write(path: Path, tokens: Iterable[Token]) -> None:
    """Replaces the file as a whole: whoever reads it meanwhile sees the old one or the new one."""
    text = json.dumps({"tokens": [entry(token) for token in tokens]}, indent=2) + "\n"
    # mkstemp lets only its owner read.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class TokenFile:
    """The tokens of a file, read again when it changes. What cannot be read leaves those there were in force."""

    def __init__(self, path: Path, *, changed: Callable[[set[str], set[str]], None] | None = None) -> None:
        """`changed` hears the names of tokens that came, or are not as they were, and of those that went."""
        self._path = path
        self._changed = changed or (lambda came, went: None)
        self._seen = self._state()
        self._tokens = read(path)

    def tokens(self) -> list[Token]:
        if (state := self._state()) != self._seen:
            self._seen = state
            try:
                before, self._tokens = self._tokens, read(self._path)
                came, went = set(self._tokens) - set(before), set(before) - set(self._tokens)
                self._changed({token.name for token in came}, {token.name for token in went - came})
            except TokenFileError as error:
                logger.error("%s The tokens from before stay in force.", error)
        return self._tokens

    def _state(self) -> tuple[int, ...]:
        try:
            found = self._path.stat()
        except OSError:
            return ()
        return found.st_ino, found.st_size, found.st_mtime_ns


def _parse(entry: dict[str, Any]) -> Token:
    known = {"name", "scopes", "sha256", "certificate", "quota"}
    if unknown := set(entry) - known:
        raise ValueError(f"a token has the unknown key {min(unknown)!r}")
    if not NAME.fullmatch(entry["name"]):
        raise ValueError(f"{entry['name']!r} is not a name of letters, digits and ._@-")
    quota = entry.get("quota", {})
    limits = {item.name for item in fields(Quota)}
    if unknown := set(quota) - limits:
        raise ValueError(f"{min(unknown)!r} is not a quota; there are {', '.join(sorted(limits))}")
    if any(type(limit) is not int or limit < 0 for limit in quota.values()):
        raise ValueError(f"the quotas of {entry['name']!r} are not whole numbers from 0 on")
    secret = entry.get("sha256", "")
    if secret and not re.fullmatch(r"[0-9a-f]{64}", secret):
        raise ValueError(f"the sha256 of {entry['name']!r} is not 64 hexadecimal digits")
    if not (secret or entry.get("certificate")):
        raise ValueError(f"{entry['name']!r} has neither a sha256 nor a certificate")
    scopes = frozenset(Scope(scope) for scope in entry.get("scopes", ()))
    return Token(entry["name"], scopes, secret, str(entry.get("certificate", "")), Quota(**quota))


def entry(token: Token) -> dict[str, Any]:
    """The token as the file has it; what is empty is left out."""
    quota = {name: limit for name, limit in asdict(token.quota).items() if limit is not None}
    said = {"scopes": sorted(token.scopes), "sha256": token.digest, "certificate": token.certificate, "quota": quota}
    return {"name": token.name, **{key: value for key, value in said.items() if value}}

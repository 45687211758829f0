"""The audit log: who loaded, changed and let go of what, and who was turned away. One JSON object a line."""

from __future__ import annotations

import functools
import json
import logging
import logging.handlers
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from denoised.errors import (
    NotOwnerError,
    QuotaExceededError,
    ScopeMissingError,
    SourceNotAllowedError,
    UnauthenticatedError,
)

LOGGER = "denoised_server.audit"
REFUSALS = frozenset(
    kind.reason.lower()
    for kind in (UnauthenticatedError, ScopeMissingError, NotOwnerError, QuotaExceededError, SourceNotAllowedError)
)
# Of requests and responses.
NAMES = ("name", "source", "pipeline_id", "pipeline", "force", "shared")
# Callers choose texts, and a line should be one that can be read.
MAX_TEXT = 1000


class Audit:
    """Writes events to a file of its own, or with the rest of the log where there is none.

    Prompts are in it only when `prompts` says so.
    """

    def __init__(self, file: Path | None = None, *, prompts: bool = False) -> None:
        self.prompts = prompts
        self._logger = logging.getLogger(LOGGER)
        if file is not None:
            # Made before it is opened, so that nobody else ever reads it.
            os.close(os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
            # Follows a file that is rotated.
            handler = logging.handlers.WatchedFileHandler(file)
            handler.setFormatter(logging.Formatter("%(message)s"))
            self._logger.addHandler(handler)
            self._logger.propagate = False

    def record(self, event: str, facts: Mapping[str, object]) -> None:
        """Facts without a value are left out."""
        told = {key: value[:MAX_TEXT] if isinstance(value, str) else value for key, value in facts.items() if value}
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **told}
        self._logger.info(json.dumps(line, ensure_ascii=False))


@functools.cache
def _telling(message: Any) -> frozenset[str]:
    """Which fields of a kind of message say anything; most events of streams have none."""
    return frozenset(field.name for field in message.fields) & {*NAMES, "spec", "prompt"}


def facts_of(message: Any, *, prompts: bool = False) -> dict[str, object]:
    """What is worth telling of a request or a response: which pipeline it names, and what is loaded into it."""
    fields = _telling(message.DESCRIPTOR)
    facts: dict[str, object] = {}
    for name in NAMES:
        if name in fields and isinstance(value := getattr(message, name), str | bool):
            facts["pipeline" if name == "name" else name] = value
    if "pipeline" in fields and not isinstance(message.pipeline, str) and message.pipeline.name:
        facts["pipeline"] = message.pipeline.name
    if "spec" in fields:
        facts |= {"repo_id": message.spec.repo_id, "revision": message.spec.revision}
    if prompts and "prompt" in fields:
        facts["prompt"] = message.prompt
    return facts

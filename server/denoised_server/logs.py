"""Logging of the daemon and its workers: one line an event, on stderr, as text for people or as JSON for machines.

Each line says for which request it is, of which class the pipeline, and on which worker, as far as that is known.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from typing import Any

from denoised import traces

from . import request_context

TEXT = "%(asctime)s %(levelname)-7s %(process)d %(name)s: %(message)s"


def set_up(*, verbose: bool, log_format: str = "text") -> None:
    """INFO and above; DEBUG of our own modules, and what the libraries under them advise, too when verbose."""
    if not verbose:
        # Read when they are imported, which is when they speak first: of packages that nothing here needs.
        for library in ("DIFFUSERS", "TRANSFORMERS"):
            os.environ.setdefault(f"{library}_VERBOSITY", "error")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter(TEXT))
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    logging.getLogger("denoised_server").setLevel(logging.DEBUG if verbose else logging.INFO)


class TextFormatter(logging.Formatter):
    """What is known of the request comes after the message. Newlines are escaped, but for those of a traceback."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        line = super().formatMessage(record).replace("\n", "\\n")
        known = " ".join(f"{name}={value}" for name, value in _context().items())
        return f"{line} [{known}]" if known else line


class JsonFormatter(logging.Formatter):
    """One object a line; a traceback is one of its fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        line |= _context()
        if trace_id := traces.trace_id():
            line["trace_id"] = trace_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _context() -> dict[str, str]:
    request = request_context.current()
    known = {
        "request_id": request.request_id,
        "worker": request.worker,
        "pipeline_class": request.pipeline_class,
    }
    return {name: value for name, value in known.items() if value}

"""What the commands print: tables for people, JSON for scripts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import typer
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.table import Table

from ..units import format_seconds

# Wide enough for any table: rows that are folded inside their cells can be neither read nor copied.
TABLE_WIDTH = 400
WIDE_INTEGERS = (FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT64)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Prints rows under columns; those named in `right` are numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=TABLE_WIDTH, highlight=False, markup=False).print(table, soft_wrap=True)


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def to_json(message: Message) -> dict[str, Any]:
    """A message with all its fields under their names in the .proto files; sizes are numbers."""
    data = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    _unquote(message, data)
    return data


def _unquote(message: Message, data: dict[str, Any]) -> None:
    # protobuf writes 64-bit integers as text, for the sake of JavaScript.
    for field in message.DESCRIPTOR.fields:
        value = data.get(field.name)
        if value is None or (field.message_type is not None and field.message_type.GetOptions().map_entry):
            continue
        if field.type in WIDE_INTEGERS:
            data[field.name] = [int(item) for item in value] if isinstance(value, list) else int(value)
        elif isinstance(value, dict):
            _unquote(getattr(message, field.name), value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for item, part in zip(getattr(message, field.name), value, strict=True):
                _unquote(item, part)


def ago(moment: Timestamp) -> str:
    """How long since then; nothing where there is no such moment."""
    return format_seconds(time.time() - moment.ToNanoseconds() / 1e9) if moment.ByteSize() else ""


def until(moment: Timestamp) -> str:
    """How long until then; nothing where there is no such moment."""
    return format_seconds(moment.ToNanoseconds() / 1e9 - time.time()) if moment.ByteSize() else ""


def bar(part: int, whole: int, width: int = 10) -> str:
    """A share as a row of blocks."""
    filled = min(width, round(width * part / whole)) if whole > 0 else 0
    return "█" * filled + "░" * (width - filled)


def segments(parts: Sequence[tuple[str, int]], whole: int, width: int = 20) -> str:
    """Shares of a whole as blocks, each part with its own; what is left over is dots."""
    text, total = "", 0
    for block, size in parts:
        total += max(0, size)
        end = min(width, round(width * total / whole)) if whole > 0 else 0
        text += block * (end - len(text))
    return text + "·" * (width - len(text))

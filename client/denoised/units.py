"""Sizes and durations, as people read and write them."""

from __future__ import annotations

import datetime
import math
import re
from typing import TypeAlias

from google.protobuf import duration_pb2

from .errors import InvalidFieldError

# Seconds, a timedelta, or text such as "90s", "30m", "1h30m", "2d".
Ttl: TypeAlias = float | datetime.timedelta | str

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
# What google.protobuf.Duration can hold, about 10,000 years.
MAX_SECONDS = 315_576_000_000


def to_seconds(value: Ttl, field: str = "ttl") -> float:
    """Raises InvalidFieldError for what is no duration."""
    match value:
        case datetime.timedelta():
            return value.total_seconds()
        case str() if found := re.fullmatch(r"((?:\d+(?:\.\d+)?[smhd])+)|(\d+(?:\.\d+)?)", value.strip()):
            parts = re.findall(r"([\d.]+)([smhd])", found[1]) if found[1] else [(found[2], "s")]
            if (seconds := sum(float(size) * SECONDS[unit] for size, unit in parts)) <= MAX_SECONDS:
                return seconds
        case bool():
            pass
        case int() | float() if math.isfinite(value) and abs(value) <= MAX_SECONDS:
            return float(value)
    raise InvalidFieldError.of(field, f"{value!r} is not a duration.", hint='Write seconds, or "90s", "30m", "1h30m".')


def to_duration(value: Ttl, field: str = "ttl") -> duration_pb2.Duration:
    """Raises InvalidFieldError for what is no duration."""
    duration = duration_pb2.Duration()
    duration.FromMicroseconds(round(to_seconds(value, field) * 1e6))
    return duration


def from_duration(duration: duration_pb2.Duration) -> float:
    """Seconds."""
    return duration.ToNanoseconds() / 1e9


def format_bytes(size: int) -> str:
    """Three digits and a binary unit: "0 B", "15.1 MiB"."""
    value, units = float(size), ["TiB", "GiB", "MiB", "KiB", "B"]
    while abs(value) >= 1000 and len(units) > 1:
        value /= 1024
        units.pop()
    return f"{value:.0f} {units[-1]}" if abs(value) >= 100 else f"{value:.3g} {units[-1]}"


def format_seconds(seconds: float) -> str:
    """The largest two units: "4s", "12m 3s", "2h 5m", "3d 1h"."""
    left, parts = max(0, round(seconds)), list[str]()
    for unit, size in reversed(SECONDS.items()):
        count, left = divmod(left, size)
        if count or (parts and len(parts) < 2):
            parts.append(f"{count}{unit}")
    return " ".join(part for part in parts[:2] if not part.startswith("0")) or "0s"

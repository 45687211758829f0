from __future__ import annotations

import datetime
from typing import Any

import pytest
from denoised import units
from denoised.errors import InvalidFieldError


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (90, 90),
        (0.5, 0.5),
        ("90", 90),
        ("90s", 90),
        ("30m", 1800),
        ("1.5h", 5400),
        ("1h30m", 5400),
        ("2d", 172800),
        (datetime.timedelta(minutes=1), 60),
    ],
)
def test_durations_are_understood(value: Any, seconds: float) -> None:
    assert units.to_seconds(value) == seconds
    assert units.from_duration(units.to_duration(value)) == seconds


@pytest.mark.parametrize("value", ["9" * 400, "soon", "", "1h 30", "h", float("nan"), float("inf"), True, None, 1e30])
def test_other_things_are_no_durations(value: Any) -> None:
    with pytest.raises(InvalidFieldError, match="is not a duration"):
        units.to_seconds(value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (15_800_000, "15.1 MiB"),
        (3 * 2**40, "3 TiB"),
        (2**60, "1048576 TiB"),
    ],
)
def test_sizes_have_three_digits(size: int, text: str) -> None:
    assert units.format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0s"), (0.2, "0s"), (59, "59s"), (60, "1m"), (3725, "1h 2m"), (3605, "1h"), (90_000, "1d 1h")],
)
def test_times_have_two_units(seconds: float, text: str) -> None:
    assert units.format_seconds(seconds) == text

"""When a generation is expected to end."""

from __future__ import annotations

from denoised_server.forecast import Cost
from denoised_server.pace import Pace


def test_nothing_is_said_while_nothing_is_known() -> None:
    pace = Pace(Cost(), began=100.0)
    assert pace.end(0, 0, 100.0) is None
    assert pace.end(1, 10, 105.0) is None


def test_before_two_steps_the_usual_counts() -> None:
    pace = Pace(Cost(usual=8.0), began=100.0)
    assert pace.end(0, 0, 101.0) == 108.0
    assert pace.end(1, 10, 102.0) == 108.0
    assert pace.end(1, 10, 109.0) == 109.0


def test_then_its_own_pace_and_what_comes_after_the_last_step() -> None:
    pace = Pace(Cost(usual=8.0, tail=3.0), began=100.0)
    pace.end(1, 10, 110.0)
    assert pace.end(3, 10, 114.0) == 114.0 + 7 * 2.0 + 3.0
    assert pace.end(10, 10, 130.0) == 133.0


def test_a_phase_that_begins_is_no_step() -> None:
    pace = Pace(Cost(tail=3.0), began=100.0)
    pace.end(1, 2, 101.0)
    pace.end(2, 2, 102.0)
    assert pace.end(2, 2, 104.0) == 105.0
    assert pace.end(2, 2, 107.0) == 107.0

"""Admission as a table, and by its properties."""

from __future__ import annotations

import pytest
from denoised.errors import QueueFullError
from denoised_server.admission import Admission
from denoised_server.forecast import Cost
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule


def admission(*, running: int = 1, waiting: int = 3) -> Admission[str]:
    return Admission(max_running=running, max_waiting=waiting)


def fill(line: Admission[str], *tickets: str) -> list[str]:
    admitted = []
    for ticket in tickets:
        line.add(ticket)
        admitted += line.admit(0)
    return admitted


def test_as_many_run_as_may_and_the_others_wait_in_order() -> None:
    line = admission(running=2)
    assert fill(line, "a", "b", "c", "d") == ["a", "b"]
    assert line.positions() == {"c": 0, "d": 1}
    assert (line.running_count, line.waiting_count) == (2, 2)
    line.release("b", 1)
    assert line.admit(1) == ["c"]
    assert line.positions() == {"d": 0}


def test_higher_priority_goes_first_and_equals_in_order_of_arrival() -> None:
    line = admission(waiting=10)
    fill(line, "running")
    for ticket, priority in (("low", -5), ("a", 0), ("urgent", 100), ("b", 0)):
        line.add(ticket, priority=priority)
    order = []
    running = "running"
    while line.waiting_count:
        line.release(running, 0)
        (running,) = line.admit(0)
        order.append(running)
    assert order == ["urgent", "a", "b", "low"]


def serve_all(line: Admission[str], running: str) -> list[str]:
    order = []
    while line.waiting_count:
        line.release(running, 0)
        (running,) = line.admit(0)
        order.append(running)
    return order


def test_clients_of_equal_priority_take_turns_however_many_requests_each_has() -> None:
    line = admission(waiting=20)
    fill(line, "running")
    for number in range(4):
        line.add(f"a{number}", client="a")
    for number in range(2):
        line.add(f"b{number}", client="b")
    line.add("c0", client="c")
    assert serve_all(line, "running") == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]


def test_a_client_that_was_idle_has_saved_up_nothing() -> None:
    line = admission(waiting=20)
    fill(line, "running")
    running = "running"
    for number in range(5):
        line.add(f"a{number}", client="a")
    for _ in range(3):
        line.release(running, 0)
        (running,) = line.admit(0)
    for number in range(3):
        line.add(f"b{number}", client="b")
    assert serve_all(line, running) == ["b0", "a3", "b1", "a4", "b2"]


def test_priority_goes_before_turns() -> None:
    line = admission(waiting=20)
    fill(line, "running")
    for number in range(2):
        line.add(f"a{number}", client="a", priority=1)
    line.add("b0", client="b")
    assert serve_all(line, "running") == ["a0", "a1", "b0"]


def test_who_runs_as_many_as_it_may_waits_and_others_go_past() -> None:
    line = admission(running=3, waiting=20)
    for ticket, client, limit in (("a0", "a", 1), ("a1", "a", 1), ("b0", "b", None), ("b1", "b", None)):
        line.add(ticket, client=client, limit=limit)
    assert line.admit(0) == ["a0", "b0", "b1"]
    line.release("b0", 0)
    assert line.admit(0) == []
    line.release("a0", 0)
    assert line.admit(0) == ["a1"]


def test_who_gives_up_leaves_the_line() -> None:
    line = admission()
    fill(line, "a", "b", "c")
    line.release("b", 0)
    assert line.positions() == {"c": 0}
    line.release("unknown", 0)
    assert line.running_count == 1


def test_a_full_line_refuses_and_says_when_to_try_again() -> None:
    line = admission(running=2, waiting=1)
    fill(line, "a", "b", "c")
    with pytest.raises(QueueFullError) as caught:
        line.add("d")
    assert caught.value.retry_after == 1
    line.release("a", 20)
    line.admit(20)
    line.add("d")
    with pytest.raises(QueueFullError) as caught:
        line.add("e")
    # Two run at a time for 20 seconds each: a place in line is free every 10.
    assert caught.value.retry_after == 10


def test_the_advice_has_bounds() -> None:
    line = admission(waiting=0)
    fill(line, "a")
    line.release("a", 1_000_000)
    line.add("b")
    line.admit(0)
    with pytest.raises(QueueFullError) as caught:
        line.add("c")
    assert caught.value.retry_after == 60


def test_without_a_line_there_is_room_while_not_all_run() -> None:
    line = admission(waiting=0)
    assert fill(line, "a") == ["a"]
    with pytest.raises(QueueFullError):
        line.add("b")


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Callers that come, finish and give up in any order, against a list that is sorted anew each time."""

    def __init__(self) -> None:
        super().__init__()
        self.line = Admission[int](max_running=2, max_waiting=4)
        self.waiting: list[tuple[int, int]] = []
        self.running: list[int] = []
        self.arrivals = 0

    def advance(self) -> None:
        expected = []
        while self.waiting and len(self.running) < 2:
            self.waiting.sort()
            expected.append(self.waiting.pop(0)[1])
            self.running.append(expected[-1])
        assert self.line.admit(0) == expected

    @rule(priority=st.integers(-2, 2))
    def arrive(self, priority: int) -> None:
        self.arrivals += 1
        if len(self.running) == 2 and len(self.waiting) == 4:
            with pytest.raises(QueueFullError):
                self.line.add(self.arrivals, priority=priority)
        else:
            self.line.add(self.arrivals, priority=priority)
            self.waiting.append((-priority, self.arrivals))
        self.advance()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.running))
        self.running.remove(ticket)
        self.line.release(ticket, 1)
        self.advance()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(entry)
        self.line.release(entry[1], 1)
        self.advance()

    @invariant()
    def agrees(self) -> None:
        assert self.line.running_count == len(self.running) <= 2
        order = [ticket for _, ticket in sorted(self.waiting)]
        assert self.line.positions() == {ticket: position for position, ticket in enumerate(order)}
        assert len(self.running) == 2 or not self.waiting


TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
TestAnyOrderOfEvents.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


def test_who_waits_is_told_when_it_will_start_as_far_as_costs_are_known() -> None:
    line = admission(running=2, waiting=10)
    for ticket, usual in (("a", 10.0), ("b", 4.0), ("c", 3.0), ("d", 1.0), ("e", 1.0)):
        line.add(ticket, cost=Cost(usual))
        line.admit(100)
    assert line.waits(100) == {"c": 4, "d": 7, "e": 8}
    assert line.waits(103) == {"c": 1, "d": 4, "e": 5}
    assert line.wait_of_next(103) == 6
    assert line.wait_of_next(103, priority=1) == 1


def test_one_that_takes_longer_than_usual_is_expected_to_end_any_moment() -> None:
    line = admission()
    line.add("a", cost=Cost(2.0))
    line.admit(0)
    line.add("b")
    assert line.waits(5) == {"b": 0}


def test_of_what_nothing_is_known_nothing_is_said() -> None:
    line = admission(waiting=10)
    fill(line, "a", "b", "c")
    assert line.waits(0) == {}
    assert line.wait_of_next(0) == 0
    line.release("a", 6)
    line.admit(6)
    assert line.waits(6) == {"c": 6}


def test_a_client_with_few_requests_is_told_that_it_goes_before_those_of_one_with_many() -> None:
    line = admission(waiting=10)
    for number in range(5):
        line.add(f"a{number}", client="a", cost=Cost(1.0))
        line.admit(0)
    assert line.wait_of_next(0, client="a") == 5
    assert line.wait_of_next(0, client="b") == 2


def test_asking_how_long_it_would_take_changes_nothing() -> None:
    line = admission(waiting=10)
    fill(line, "running")
    for number in range(2):
        line.add(f"a{number}", client="a")
    for _ in range(3):
        line.wait_of_next(0, client="b")
    line.add("b0", client="b")
    assert serve_all(line, "running") == ["a0", "b0", "a1"]

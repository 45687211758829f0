"""Who is behind, and by how much."""

from __future__ import annotations

from denoised_server.worker.fairness import Entrant, Fairness


def test_a_client_with_many_requests_gets_no_more_than_one_with_few() -> None:
    fairness = Fairness()
    many, one = [Entrant("many") for _ in range(3)], Entrant("one")
    for entrant in (*many, one):
        fairness.enter(entrant)
    used = dict.fromkeys(("many", "one"), 0.0)
    for _ in range(100):
        first = min((*many, one), key=lambda entrant: fairness.standing(entrant, 0.1))
        fairness.charge(first, 0.1)
        used[first.client] += 0.1
    assert abs(used["many"] - used["one"]) < 0.2


def test_idle_time_is_not_saved_up() -> None:
    fairness = Fairness()
    early, late = Entrant("early"), Entrant("late")
    fairness.enter(early)
    fairness.charge(early, 100)
    fairness.enter(late)
    assert fairness.standing(late, 0)[0] == fairness.standing(early, 0)[0] == 100


def test_leaving_and_coming_back_gains_nothing() -> None:
    fairness = Fairness()
    steady, hasty = Entrant("steady"), Entrant("hasty")
    fairness.enter(steady)
    fairness.enter(hasty)
    fairness.charge(hasty, 5)
    fairness.leave(hasty)
    again = Entrant("hasty")
    fairness.enter(again)
    assert fairness.standing(again, 0) > fairness.standing(steady, 0)


def test_nothing_is_remembered_of_clients_that_the_others_have_caught_up_with() -> None:
    fairness = Fairness()
    steady = Entrant("steady")
    fairness.enter(steady)
    for number in range(50):
        passing = Entrant(f"client {number}")
        fairness.enter(passing)
        fairness.charge(passing, 1)
        fairness.leave(passing)
        fairness.charge(steady, 2)
    fairness.leave(steady)
    assert fairness._clients == {}

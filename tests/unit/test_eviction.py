"""Who leaves the device when others need its room."""

from __future__ import annotations

from dataclasses import replace

from denoised_server.worker import eviction
from denoised_server.worker.eviction import GRACE_SECONDS, STAY_SECONDS, Resident, Uses
from hypothesis import given
from hypothesis import strategies as st


def resident(digest: str, *times: float, size: int = 10, users: int = 1, seconds: float | None = None) -> Resident:
    """A component that came at 0 and was used at these times."""
    uses = Uses(0.0)
    for time in times:
        uses.used(time)
    return Resident(digest, size, size / 10 if seconds is None else seconds, users, uses)


def chosen(residents: list[Resident], needed: int, now: float = 100.0, *, for_call: bool = False) -> set[str] | None:
    found = eviction.choose(residents, needed, now, for_call=for_call)
    return None if found is None else {each.digest for each in found}


def test_what_was_not_used_for_longest_leaves_first() -> None:
    assert chosen([resident("late", 90), resident("early", 10), resident("middle", 50)], 10) == {"early"}


def test_what_is_used_often_outlives_what_was_used_last() -> None:
    often = resident("often", *range(10, 81, 10))
    assert chosen([often, resident("once", 85)], 10) == {"once"}


def test_what_more_pipelines_use_stays_longer() -> None:
    assert chosen([resident("shared", 80, users=3), resident("own", 85)], 10) == {"own"}


def test_what_is_slow_to_bring_back_stays_longer() -> None:
    slow, quick = resident("from disk", 80, seconds=10.0), resident("from host", 85, seconds=1.0)
    assert chosen([slow, quick], 10) == {"from host"}


def test_nothing_leaves_that_does_not_have_to() -> None:
    small, large = resident("small", 10, size=10), resident("large", 20, size=100)
    assert chosen([small, large], 100) == {"large"}
    assert chosen([small, large], 101) == {"small", "large"}
    assert chosen([small, large], 0) == set()


def test_what_is_fixed_never_leaves() -> None:
    fixed = replace(resident("in a call", 1), is_fixed=True)
    assert chosen([fixed], 1, now=1e9, for_call=True) is None


def test_what_waits_for_its_first_use_leaves_for_calls_only_and_last() -> None:
    fresh, used = resident("fresh"), resident("used", 9)
    assert chosen([fresh], 10, now=10) is None
    assert chosen([fresh, used], 10, now=10, for_call=True) == {"used"}
    assert chosen([fresh], 10, now=10, for_call=True) == {"fresh"}
    assert chosen([fresh], 10, now=GRACE_SECONDS + 1) == {"fresh"}


def test_what_has_come_back_is_fresh_again_until_it_is_used() -> None:
    back = resident("back", 5)
    back.uses.came(95)
    assert chosen([back], 10) is None
    back.uses.used(96)
    assert chosen([back], 10) == {"back"}


def test_what_calls_wait_for_leaves_only_for_other_calls_and_only_when_it_has_stayed() -> None:
    wanted = replace(resident("wanted", 1, seconds=0.01), is_wanted=True)
    assert chosen([wanted], 10, now=1000) is None
    assert chosen([wanted], 10, now=STAY_SECONDS / 2, for_call=True) is None
    assert chosen([wanted], 10, now=STAY_SECONDS * 2, for_call=True) == {"wanted"}
    slow = replace(wanted, return_seconds=5.0)
    assert chosen([slow], 10, now=STAY_SECONDS * 2, for_call=True) is None, "moving would take most of the time"


residents = st.lists(
    st.builds(
        Resident,
        digest=st.uuids().map(str),
        size=st.integers(0, 1000),
        return_seconds=st.floats(0, 100),
        users=st.integers(0, 5),
        uses=st.builds(Uses, arrival=st.floats(0, 200), times=st.lists(st.floats(0, 200), max_size=4).map(sorted)),
        is_wanted=st.booleans(),
        is_fixed=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda each: each.digest,
)


@given(residents, st.integers(0, 4000), st.floats(0, 400), st.booleans())
def test_the_choice_makes_room_with_as_few_as_may_leave(
    there: list[Resident], needed: int, now: float, for_call: bool
) -> None:
    found = eviction.choose(there, needed, now, for_call=for_call)
    if found is None:
        assert eviction.choose(there, needed + 1, now, for_call=for_call) is None
        return
    freed = sum(each.size for each in found)
    assert freed >= needed
    assert not [each for each in found if each.is_fixed]
    assert not [each for each in found if each.is_wanted and not (for_call and each.has_stayed(now))]
    assert not [each for each in found if freed - each.size >= needed], "one left that need not have"
    assert len({each.digest for each in found}) == len(found)


@given(residents, st.integers(0, 4000), st.floats(0, 400))
def test_a_call_finds_room_wherever_a_load_does(there: list[Resident], needed: int, now: float) -> None:
    if eviction.choose(there, needed, now, for_call=False) is not None:
        assert eviction.choose(there, needed, now, for_call=True) is not None

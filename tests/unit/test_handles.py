"""The table of handles: ids, leases, retries and pages."""

from __future__ import annotations

import pytest
from denoised.errors import InvalidFieldError, PipelineExistsError, PipelineNotFoundError
from denoised_server import handles
from denoised_server.handles import Handle, HandleTable, State
from denoised_server.messages import Derivation, Loaded, Recipe, Spec
from hypothesis import given
from hypothesis import strategies as st

RECIPE = Recipe(Spec("owner/name"))
OTHER = Recipe(Spec("owner/other"))


@pytest.fixture
def table() -> HandleTable:
    return HandleTable(default_ttl=100, max_ttl=1000)


def loaded(revision: str = "") -> Loaded:
    return Loaded("text-to-image", "FakePipeline", (), (), revision)


def activate(table: HandleTable, handle: Handle, now: float = 0.0, revision: str = "") -> Handle:
    table.activate(handle, worker="workers/0", loaded=loaded(revision), now=now)
    return handle


def test_ids_are_long_and_differ(table: HandleTable) -> None:
    names = {table.open(RECIPE, now=0).name for _ in range(100)}
    assert len(names) == 100
    assert all(len(name.removeprefix("pipelines/")) >= 20 for name in names)
    assert all(table.get(name).name == name for name in names)


@pytest.mark.parametrize("wrong", ["A", "1a", "-a", "a_b", "a" * 64, "ä", "a/b", "a\n"])
def test_a_chosen_id_must_be_one(table: HandleTable, wrong: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        table.open(RECIPE, now=0, pipeline_id=wrong)
    assert caught.value.metadata["field"] == "pipeline_id"
    assert len(table) == 0


@pytest.mark.parametrize("wrong", ["", "a", "pipelines/", "pipelines/A", "workers/0", "pipelines/a/b"])
def test_a_name_must_be_one(table: HandleTable, wrong: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        table.get(wrong, field="source")
    assert caught.value.metadata["field"] == "source"


def test_a_chosen_id_with_the_same_recipe_is_the_same_handle(table: HandleTable) -> None:
    first = table.open(RECIPE, now=0, pipeline_id="mine")
    assert first.name == "pipelines/mine"
    assert table.open(Recipe(Spec("owner/name", revision="main")), now=5, pipeline_id="mine") is first
    assert first.last_use_time == 5


@pytest.mark.parametrize(
    "other",
    [
        OTHER,
        Recipe(Spec("owner/name", dtype="float16")),
        Recipe(Spec("owner/name", task="inpainting")),
        Recipe(Spec("owner/name", overrides={"requires_safety_checker": False})),
        Recipe(Spec("owner/name"), (Derivation("inpainting"),)),
    ],
)
def test_a_chosen_id_with_another_recipe_is_taken(table: HandleTable, other: Recipe) -> None:
    table.open(RECIPE, now=0, pipeline_id="mine")
    with pytest.raises(PipelineExistsError):
        table.open(other, now=0, pipeline_id="mine")


def test_true_and_one_are_different_overrides(table: HandleTable) -> None:
    table.open(Recipe(Spec("a", overrides={"x": 1})), now=0, pipeline_id="mine")
    with pytest.raises(PipelineExistsError):
        table.open(Recipe(Spec("a", overrides={"x": True})), now=0, pipeline_id="mine")


def test_the_resolved_revision_and_the_one_asked_for_mean_the_same_handle(table: HandleTable) -> None:
    handle = activate(table, table.open(RECIPE, now=0, pipeline_id="mine"), revision="c0ffee")
    assert handle.recipe.spec.revision == "c0ffee"
    for revision in ("", "main", "c0ffee"):
        assert table.open(Recipe(Spec("owner/name", revision)), now=0, pipeline_id="mine") is handle
    with pytest.raises(PipelineExistsError):
        table.open(Recipe(Spec("owner/name", "decaf")), now=0, pipeline_id="mine")


def test_a_request_sent_again_gets_the_same_handle_for_an_hour(table: HandleTable) -> None:
    first = table.open(RECIPE, now=0, request_id="r1")
    assert table.open(RECIPE, now=3599, request_id="r1") is first
    assert table.open(RECIPE, now=3601, request_id="r1") is not first


def test_a_request_whose_handle_is_gone_gets_a_new_one(table: HandleTable) -> None:
    first = table.open(RECIPE, now=0, request_id="r1")
    table.remove(first)
    assert table.open(RECIPE, now=1, request_id="r1") is not first


def test_a_request_id_belongs_to_one_recipe(table: HandleTable) -> None:
    table.open(RECIPE, now=0, request_id="r1")
    with pytest.raises(InvalidFieldError) as caught:
        table.open(OTHER, now=0, request_id="r1")
    assert caught.value.metadata["field"] == "request_id"


def test_a_request_id_has_at_most_128_characters(table: HandleTable) -> None:
    table.open(RECIPE, now=0, request_id="r" * 128)
    with pytest.raises(InvalidFieldError):
        table.open(RECIPE, now=0, request_id="r" * 129)


@pytest.mark.parametrize(("asked", "given_"), [(None, 100), (1, 1), (50, 50), (1000, 1000), (5000, 1000)])
def test_a_lease_is_what_was_asked_for_within_bounds(table: HandleTable, asked: float | None, given_: float) -> None:
    assert table.open(RECIPE, now=0, ttl=asked).ttl == given_


@pytest.mark.parametrize("ttl", [0, 0.5, -1])
def test_a_lease_of_less_than_a_second_is_refused(table: HandleTable, ttl: float) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        table.open(RECIPE, now=0, ttl=ttl)
    assert caught.value.metadata["field"] == "ttl"
    handle = activate(table, table.open(RECIPE, now=0))
    with pytest.raises(InvalidFieldError):
        table.renew(handle.name, now=0, ttl=ttl)


def test_use_and_renewal_push_the_expiry(table: HandleTable) -> None:
    handle = activate(table, table.open(RECIPE, now=0))
    assert handle.expire_time == 100
    table.use(handle.name, now=50)
    assert handle.expire_time == 150
    table.renew(handle.name, now=60, ttl=10)
    assert handle.expire_time == 70
    table.renew(handle.name, now=65)
    assert handle.expire_time == 75


def test_the_lease_starts_when_the_load_is_over(table: HandleTable) -> None:
    assert activate(table, table.open(RECIPE, now=0), now=90).expire_time == 190


def test_only_what_is_active_and_unused_expires(table: HandleTable) -> None:
    idle, pinned, leaving = (activate(table, table.open(RECIPE, now=0)) for _ in range(3))
    table.open(RECIPE, now=0)
    pinned.pins = 1
    leaving.state = State.UNLOADING
    assert table.expired(99) == []
    assert table.expired(100) == [idle]
    pinned.pins = 0
    assert table.expired(100) == [idle, pinned]


def test_a_pipeline_on_its_way_out_takes_no_work(table: HandleTable) -> None:
    handle = activate(table, table.open(RECIPE, now=0, pipeline_id="mine"))
    handle.state = State.UNLOADING
    assert table.is_leaving("pipelines/mine", "", now=0)
    assert table.get(handle.name) is handle
    with pytest.raises(PipelineNotFoundError):
        table.use(handle.name, now=0)


def test_a_dead_worker_takes_no_handle_with_it(table: HandleTable) -> None:
    here = activate(table, table.open(RECIPE, now=0))
    there = activate(table, table.open(RECIPE, now=0))
    there.worker = "workers/1"
    table.lose("workers/0")
    assert (here.worker, here.state, there.worker) == ("", State.ACTIVE, "workers/1")


def test_a_removed_handle_is_not_found_and_remembered_as_gone(table: HandleTable) -> None:
    handle = table.open(RECIPE, now=0, pipeline_id="mine")
    assert not table.is_gone("pipelines/mine")
    table.remove(handle)
    assert table.is_gone("pipelines/mine")
    assert handle not in table
    with pytest.raises(PipelineNotFoundError):
        table.get("pipelines/mine")
    again = table.open(RECIPE, now=0, pipeline_id="mine")
    assert not table.is_gone("pipelines/mine")
    assert again in table
    assert handle not in table


def test_not_everything_that_is_gone_is_remembered(table: HandleTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "MAX_TOMBSTONES", 2)
    gone = [table.open(RECIPE, now=0) for _ in range(3)]
    for handle in gone:
        table.remove(handle)
    assert [table.is_gone(handle.name) for handle in gone] == [False, True, True]


@pytest.mark.parametrize(("size", "token", "field"), [(-1, "", "page_size"), (0, "no token", "page_token")])
def test_a_page_must_be_asked_for_properly(table: HandleTable, size: int, token: str, field: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        table.page(size=size, token=token)
    assert caught.value.metadata["field"] == field


def test_pages_have_fifty_entries_by_default_and_five_hundred_at_most(table: HandleTable) -> None:
    for _ in range(501):
        table.open(RECIPE, now=0)
    assert len(table.page(size=0, token="")[0]) == 50
    assert len(table.page(size=1000, token="")[0]) == 500


@given(st.lists(st.sampled_from(["open", "remove oldest", "remove newest", "page"])), st.integers(1, 3))
def test_pages_show_every_lasting_handle_once_and_in_order(steps: list[str], size: int) -> None:
    table = HandleTable(default_ttl=100, max_ttl=1000)
    lasting = [table.open(RECIPE, now=0) for _ in range(5)]
    passing = []
    seen: list[Handle] = []
    token = ""
    for step in [*steps, *["page"] * 20]:
        match step:
            case "open":
                passing.append(table.open(RECIPE, now=0))
            case "remove oldest" if passing:
                table.remove(passing.pop(0))
            case "remove newest" if passing:
                table.remove(passing.pop())
            case "page" if not seen or token:
                found, token = table.page(size=size, token=token)
                seen += found
    numbers = [handle.number for handle in seen]
    assert numbers == sorted(set(numbers))
    assert set(lasting) <= set(seen)


@given(st.lists(st.tuples(st.sampled_from(["open", "use", "pin", "unpin", "renew"]), st.integers(0, 60)), max_size=30))
def test_what_expires_was_unused_for_its_whole_lease(steps: list[tuple[str, int]]) -> None:
    table = HandleTable(default_ttl=100, max_ttl=1000)
    now = 0.0
    used: dict[Handle, float] = {}
    for step, pause in steps:
        now += pause
        for handle in table.expired(now):
            assert handle.pins == 0
            assert now - used[handle] >= handle.ttl
            table.remove(handle)
        for handle in table:
            assert handle.pins or now - used[handle] < handle.ttl
        newest = max(table, key=lambda handle: handle.number, default=None)
        if step == "open" or newest is None:
            newest = activate(table, table.open(RECIPE, now=now), now)
        elif step == "use":
            table.use(newest.name, now=now)
        elif step == "renew":
            table.renew(newest.name, now=now, ttl=30)
        else:
            newest.pins = int(step == "pin")
            continue
        used[newest] = now


@pytest.mark.parametrize("asked", [-1.0, 9.2e18, 315_576_000_001.0])
def test_a_time_that_no_duration_can_say_is_without_end(asked: float) -> None:
    """Else the pipeline could be shown to nobody, nor any list that it is in."""
    table = HandleTable(default_ttl=60, max_ttl=60)
    assert table.open(Recipe(Spec("weights")), now=0, keep_alive=asked).keep_alive is None
    kept = table.open(Recipe(Spec("weights")), now=0, keep_alive=315_576_000_000.0)
    assert kept.keep_alive == 315_576_000_000.0

"""The pool over a fake executor: joining, rebuilding, unloading, watching, draining."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
from denoised.errors import (
    InternalError,
    InvalidFieldError,
    NotAPipelineError,
    PipelineExistsError,
    PipelineNotFoundError,
    PipelineUnloadedError,
    QueueFullError,
    RequestKillsWorkerError,
    ShuttingDownError,
    UnknownArgumentError,
    WatchLaggedError,
    WorkerLostError,
)
from denoised.values import Plain
from denoised_server import supervision, watchers
from denoised_server.generation import GenerationEvent, Queued, Started, Summary, Terms
from denoised_server.handles import State
from denoised_server.messages import (
    Derivation,
    Derive,
    Generate,
    Load,
    LoadProgress,
    Outcome,
    Output,
    Progress,
    Spec,
    Unload,
)
from denoised_server.pool import DEFAULT_TERMS, Lease, Pool
from denoised_server.supervision import WorkerState
from denoised_server.views import PipelineView, WorkerView
from denoised_server.watchers import ChangeKind

from tests.unit.fake_executor import WEIGHT_BYTES, FakeExecutor

MakePool = Callable[..., Awaitable[Pool]]
SPEC = Spec("weights")
INPAINTING = Derivation("inpainting")


@pytest.fixture
def executor() -> FakeExecutor:
    return FakeExecutor()


@pytest.fixture
async def make_pool(executor: FakeExecutor) -> AsyncIterator[MakePool]:
    """Starts pools over the executor, or another one, and stops them."""
    pools = []

    async def make(other: FakeExecutor | None = None, **settings: Any) -> Pool:
        pools.append(Pool(other or executor, **settings))
        await pools[-1].start()
        return pools[-1]

    yield make
    for pool in pools:
        await pool.stop()


@pytest.fixture
async def pool(make_pool: MakePool) -> Pool:
    return await make_pool()


async def load(pool: Pool, spec: Spec = SPEC, **lease: Any) -> PipelineView:
    view = [event async for event in pool.load(spec, Lease(**lease))][-1]
    assert isinstance(view, PipelineView)
    return view


async def events(pool: Pool, command: Generate, terms: Terms = DEFAULT_TERMS) -> AsyncGenerator[GenerationEvent, None]:
    """What happens after the start."""
    async with aclosing(pool.generate(command, terms)) as numbered:
        async for entry in numbered:
            if not isinstance(entry.event, Started):
                yield entry.event


async def generate(pool: Pool, name: str, prompt: str = "a cat", steps: int = 3, **others: Any) -> list[Any]:
    arguments: dict[str, Plain] = {"prompt": prompt, "num_inference_steps": steps}
    return [event async for event in events(pool, Generate(name, arguments, **others))]


def hanging(pool: Pool, name: str, **others: Any) -> AsyncGenerator[GenerationEvent, None]:
    return events(pool, Generate(name, {"prompt": "hang"}, **others))


def names(pool: Pool) -> list[str]:
    return [view.name for view in pool.list_pipelines(page_size=0, page_token="")[0]]


def only_worker(pool: Pool) -> WorkerView:
    (worker,), _ = pool.list_workers(page_size=0, page_token="")
    return worker


async def soon(predicate: Callable[[], object]) -> None:
    """Lets everything else run until something is true."""
    async with asyncio.timeout(5):
        while not predicate():  # noqa: ASYNC110 - nothing here tells when to look again.
            await asyncio.sleep(0)


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


# Loading


async def test_a_load_yields_progress_and_then_the_pipeline(pool: Pool) -> None:
    events: list[Any] = [event async for event in pool.load(SPEC, Lease())]
    assert isinstance(events[0], LoadProgress)
    view = events[-1]
    assert (view.state, view.worker, view.residency) == (State.ACTIVE, "workers/0", "device")
    assert (view.exclusive_bytes, view.shared_bytes) == (WEIGHT_BYTES, 0)
    assert pool.get(view.name) == view


async def test_equal_loads_at_the_same_time_are_one_load_with_a_handle_for_each(
    pool: Pool, executor: FakeExecutor
) -> None:
    executor.hold(Load)
    loads = [asyncio.create_task(load(pool)) for _ in range(5)]
    await soon(lambda: len(executor.sent(Load)) == 1)
    await settle()
    executor.release()
    views = await asyncio.gather(*loads)
    assert len({view.name for view in views}) == 5
    assert len(executor.sent(Load)) == 1
    assert len(executor.sent(Derive)) == 4
    assert {pool.get(view.name).shared_bytes for view in views} == {WEIGHT_BYTES}
    assert {part.sharer_count for part in pool.get(views[0].name).components if part.component.digest} == {5}


async def test_a_load_that_comes_while_twins_are_made_still_joins(pool: Pool, executor: FakeExecutor) -> None:
    executor.hold(Derive)
    first, second = (asyncio.create_task(load(pool)) for _ in range(2))
    await soon(lambda: executor.sent(Derive))
    third = asyncio.create_task(load(pool))
    await settle()
    executor.release()
    await asyncio.gather(first, second, third)
    assert (len(executor.sent(Load)), len(executor.sent(Derive))) == (1, 2)


async def test_different_loads_are_not_joined(pool: Pool, executor: FakeExecutor) -> None:
    executor.hold(Load)
    loads = [asyncio.create_task(load(pool, Spec("weights", dtype=dtype))) for dtype in ("float32", "float16")]
    await soon(lambda: len(executor.sent(Load)) == 2)
    executor.release()
    await asyncio.gather(*loads)


async def test_a_failed_load_leaves_nothing_behind(pool: Pool, executor: FakeExecutor) -> None:
    executor.hold(Load)
    loads = [asyncio.create_task(load(pool, Spec("absent"), request_id="r1", pipeline_id="mine"))]
    loads.append(asyncio.create_task(load(pool, Spec("absent"))))
    await soon(lambda: executor.sent(Load))
    await settle()
    assert {view.state for view in pool.list_pipelines(page_size=0, page_token="")[0]} == {State.LOADING}
    executor.release()
    for error in await asyncio.gather(*loads, return_exceptions=True):
        assert isinstance(error, NotAPipelineError)
    await soon(lambda: names(pool) == [])
    assert executor.workers["workers/0"].pipelines == {}
    await load(pool, request_id="r1", pipeline_id="mine")


async def test_leaving_a_load_abandons_it(pool: Pool, executor: FakeExecutor) -> None:
    executor.hold(Load)
    task = asyncio.create_task(load(pool))
    await soon(lambda: executor.sent(Load))
    task.cancel()
    await soon(lambda: names(pool) == [])
    assert [type(command) for command in executor.cancelled] == [Load]


async def test_a_load_that_another_caller_waits_for_goes_on(pool: Pool, executor: FakeExecutor) -> None:
    executor.hold(Load)
    first, second = (asyncio.create_task(load(pool)) for _ in range(2))
    await soon(lambda: executor.sent(Load))
    await settle()
    first.cancel()
    await settle()
    executor.release()
    view = await second
    # What was loaded under the name of the caller who left is gone, its weights are not.
    await soon(lambda: names(pool) == [view.name])
    assert list(executor.workers["workers/0"].pipelines) == [view.name]
    assert not executor.cancelled
    assert pool.get(view.name).exclusive_bytes == WEIGHT_BYTES


async def test_an_abandoned_id_is_free_again_once_the_worker_has_let_go(pool: Pool, executor: FakeExecutor) -> None:
    executor.hold(Load)
    first = asyncio.create_task(load(pool, pipeline_id="mine"))
    await soon(lambda: executor.sent(Load))
    first.cancel()
    await asyncio.wait([first])
    executor.release()
    assert (await load(pool, Spec("other"), pipeline_id="mine")).name == "pipelines/mine"
    assert executor.workers["workers/0"].pipelines == {"pipelines/mine": "other"}


async def test_a_chosen_id_with_the_same_spec_joins_and_with_another_is_taken(
    pool: Pool, executor: FakeExecutor
) -> None:
    first = await load(pool, pipeline_id="mine")
    assert (await load(pool, pipeline_id="mine")).name == first.name
    assert len(executor.sent(Load)) == 1
    with pytest.raises(PipelineExistsError):
        await load(pool, Spec("other"), pipeline_id="mine")


async def test_a_request_sent_again_joins_the_first_one(pool: Pool, executor: FakeExecutor) -> None:
    executor.hold(Load)
    loads = [asyncio.create_task(load(pool, request_id="r1")) for _ in range(2)]
    await soon(lambda: executor.sent(Load))
    loads[0].cancel()
    await settle()
    executor.release()
    name = (await loads[1]).name
    assert (await load(pool, request_id="r1")).name == name
    assert (len(executor.sent(Load)), len(executor.sent(Derive))) == (1, 0)


@pytest.mark.parametrize("weights", ["weights", "absent"])
async def test_a_request_sent_again_waits_until_the_abandoned_or_failed_load_is_gone(
    pool: Pool, executor: FakeExecutor, weights: str
) -> None:
    executor.hold(Unload, *([Load] if weights == "weights" else []))
    first = asyncio.create_task(load(pool, Spec(weights), request_id="r1"))
    await soon(lambda: executor.sent(Load))
    await settle()
    first.cancel()
    await asyncio.wait([first])
    second = asyncio.create_task(load(pool, request_id="r1"))
    await settle()
    executor.release()
    view = await second
    assert view.state is State.ACTIVE
    assert names(pool) == [view.name] == list(executor.workers["workers/0"].pipelines)


async def test_a_request_sent_again_does_not_get_what_is_being_unloaded(pool: Pool) -> None:
    first = await load(pool, request_id="r1")
    async with aclosing(hanging(pool, first.name)) as running:
        await anext(running)
        unloading = asyncio.create_task(pool.unload(first.name))
        await settle()
        second = asyncio.create_task(load(pool, request_id="r1"))
        await settle()
        assert not second.done()
    await unloading
    assert (await second).state is State.ACTIVE
    assert (await second).name != first.name


async def test_a_load_whose_worker_dies_fails_and_may_be_sent_again(pool: Pool, executor: FakeExecutor) -> None:
    with pytest.raises(WorkerLostError) as caught:
        await load(pool, Spec("die"), request_id="r1")
    assert caught.value.retry_after
    assert (await load(pool, request_id="r1")).state is State.ACTIVE


async def test_loads_go_where_the_weights_are_and_others_where_there_is_room(make_pool: MakePool) -> None:
    executor = FakeExecutor(2)
    pool = await make_pool(executor)
    cats, dogs = await asyncio.gather(load(pool, Spec("cat")), load(pool, Spec("dog")))
    assert {cats.worker, dogs.worker} == {"workers/0", "workers/1"}
    for first in (cats, dogs):
        again = await load(pool, first.recipe.spec)
        assert again.worker == first.worker


# Deriving


async def test_deriving_shares_all_bytes_and_depends_on_nothing(pool: Pool, executor: FakeExecutor) -> None:
    source = await load(pool)
    derived = await pool.derive(source.name, INPAINTING, Lease(pipeline_id="painter"))
    assert derived.name == "pipelines/painter"
    assert (derived.source, derived.recipe.derivations) == (source.name, (INPAINTING,))
    assert (derived.exclusive_bytes, derived.shared_bytes) == (0, WEIGHT_BYTES)
    assert len(executor.sent(Load)) == 1
    assert await pool.unload(source.name) == 0
    assert pool.get(derived.name).exclusive_bytes == WEIGHT_BYTES
    await generate(pool, derived.name)
    assert await pool.unload(derived.name) == WEIGHT_BYTES


async def test_a_derivation_sent_again_is_the_same_pipeline(pool: Pool) -> None:
    source = await load(pool)
    both = await asyncio.gather(*(pool.derive(source.name, INPAINTING, Lease(request_id="r1")) for _ in range(2)))
    assert both[0].name == both[1].name
    with pytest.raises(InvalidFieldError):
        await pool.derive(source.name, Derivation("image-to-image"), Lease(request_id="r1"))


async def test_deriving_from_what_is_not_there_names_the_field(pool: Pool) -> None:
    with pytest.raises(PipelineNotFoundError):
        await pool.derive("pipelines/absent", INPAINTING, Lease())
    with pytest.raises(InvalidFieldError) as caught:
        await pool.derive("absent", INPAINTING, Lease())
    assert caught.value.metadata["field"] == "source"


async def test_deriving_from_a_pipeline_that_was_lost_brings_it_back(pool: Pool, executor: FakeExecutor) -> None:
    source = await load(pool)
    executor.kill("workers/0")
    await settle()
    derived = await pool.derive(source.name, INPAINTING, Lease())
    assert set(executor.workers["workers/0"].pipelines) == {source.name, derived.name}


# Generating


async def test_a_generation_streams_steps_output_and_a_summary(pool: Pool) -> None:
    view = await load(pool)
    events = await generate(pool, view.name, seeds=(7,))
    assert events[:3] == [Progress(1, 3), Progress(2, 3), Progress(3, 3)]
    assert isinstance(events[3], Output)
    assert events[4] == Summary(events[4].queue_seconds, events[4].finished, (7,), events[4].making)
    assert events[4].making.command.seeds == (7,)
    assert len(events) == 5


async def test_a_seed_is_drawn_before_the_start_when_none_is_sent(pool: Pool, executor: FakeExecutor) -> None:
    view = await load(pool)
    summaries = [(await generate(pool, view.name))[-1] for _ in range(2)]
    seeds = [command.seeds for command in executor.sent(Generate)]
    assert [summary.seeds for summary in summaries] == seeds
    assert seeds[0] != seeds[1]
    await generate(pool, view.name, generators=(("cpu", b"state"),))
    assert executor.sent(Generate)[-1].seeds == ()


async def test_bad_arguments_are_refused_before_anything_is_sent(pool: Pool, executor: FakeExecutor) -> None:
    view = await load(pool)
    with pytest.raises(UnknownArgumentError):
        await anext(events(pool, Generate(view.name, {"promt": "a cat"})))
    with pytest.raises(InvalidFieldError):
        await generate(pool, view.name, steps=-1)
    assert executor.sent(Generate) == []
    assert pool.get(view.name).generation_count == 0


async def test_a_generation_may_wait_for_a_pipeline_that_is_being_loaded(pool: Pool, executor: FakeExecutor) -> None:
    executor.hold(Load)
    loading = asyncio.create_task(load(pool, pipeline_id="mine"))
    await soon(lambda: executor.sent(Load))
    early = asyncio.create_task(generate(pool, "pipelines/mine"))
    wrong = asyncio.create_task(generate(pool, "pipelines/mine", steps=-1))
    await settle()
    executor.release()
    await loading
    assert (await early)[0] == Queued(0)
    with pytest.raises(InvalidFieldError):
        await wrong


async def test_closing_a_generation_cancels_it(pool: Pool, executor: FakeExecutor) -> None:
    view = await load(pool)
    async with aclosing(hanging(pool, view.name)) as events:
        await anext(events)
        assert pool.get(view.name).generation_count == 1
    assert [type(command) for command in executor.cancelled] == [Generate]
    assert pool.get(view.name).generation_count == 0


async def test_who_has_to_wait_hears_where_it_stands(make_pool: MakePool) -> None:
    pool = await make_pool(max_running=1)
    view = await load(pool)
    async with aclosing(hanging(pool, view.name)) as running, aclosing(hanging(pool, view.name)) as second:
        await anext(running)
        assert await anext(second) == Queued(0)
        urgent = events(pool, Generate(view.name, {"num_inference_steps": 1}, priority=5))
        assert await anext(urgent) == Queued(0)
        assert await anext(second) == Queued(1)
        await running.aclose()
        assert isinstance([event async for event in urgent][-1], Summary)
        assert await anext(second) == Queued(0)
        assert await anext(second) == Progress(1, 3)


async def test_a_full_queue_refuses_and_others_are_not_harmed(make_pool: MakePool) -> None:
    pool = await make_pool(max_running=1, max_waiting=1)
    view = await load(pool)
    async with aclosing(hanging(pool, view.name)) as running, aclosing(hanging(pool, view.name)) as waiting:
        await anext(running)
        await anext(waiting)
        with pytest.raises(QueueFullError) as caught:
            await generate(pool, view.name)
        assert caught.value.retry_after
        worker = only_worker(pool)
        assert (worker.running_count, worker.waiting_count) == (1, 1)
    assert len(await generate(pool, view.name)) == 5


async def test_the_queue_of_a_pipeline_that_is_being_loaded_is_bounded_too(
    make_pool: MakePool, executor: FakeExecutor
) -> None:
    pool = await make_pool(max_running=1, max_waiting=2)
    executor.hold(Load)
    loading = asyncio.create_task(load(pool, pipeline_id="mine"))
    await soon(lambda: executor.sent(Load))
    generations = [asyncio.create_task(generate(pool, "pipelines/mine")) for _ in range(5)]
    await settle()
    refused = [one.exception() for one in generations if one.done()]
    assert [type(error) for error in refused] == [QueueFullError] * 2
    executor.release()
    await loading
    assert all([await one for one in generations[:3]])


async def test_use_pushes_the_expiry(pool: Pool) -> None:
    view = await load(pool, ttl=60)
    await asyncio.sleep(0.01)
    await generate(pool, view.name)
    assert pool.get(view.name).expire_time > view.expire_time


async def test_an_error_of_the_worker_reaches_the_caller_alone(pool: Pool) -> None:
    view = await load(pool)
    async with aclosing(hanging(pool, view.name)) as other:
        await anext(other)
        with pytest.raises(InternalError):
            await generate(pool, view.name, "bug")
        await anext(other)


# Workers that die


async def test_a_death_loses_no_generation_and_no_handle(pool: Pool, executor: FakeExecutor) -> None:
    view = await load(pool)
    async with aclosing(hanging(pool, view.name)) as running:
        seen: list[Any] = [await anext(running) for _ in range(3)]
        executor.kill("workers/0")
        lost = pool.get(view.name)
        await settle()
        seen += [await anext(running) for _ in range(3)]
        assert [event.completed_steps for event in seen] == [1, 2, 3, 4, 5, 6]
        assert (lost.state, lost.name) == (State.ACTIVE, view.name)
    first, second = executor.sent(Generate)
    assert first == second
    assert first.seeds
    assert len(await generate(pool, view.name)) == 5
    worker = only_worker(pool)
    assert (worker.restart_count, worker.state) == (1, WorkerState.ACTIVE)


async def test_outputs_that_were_delivered_are_not_sent_again(pool: Pool, executor: FakeExecutor) -> None:
    view = await load(pool)
    command = Generate(view.name, {"prompt": "die at the end"}, seeds=(1,))
    seen: list[Any] = [event async for event in events(pool, command)]
    assert [type(event) for event in seen] == [Progress, Progress, Progress, Output, Summary]
    assert seen[-1].replays == 1


async def test_a_request_that_kills_workers_is_refused_and_remembered(
    pool: Pool, executor: FakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "BACKOFF_SECONDS", (0.0,))
    view = await load(pool)
    with pytest.raises(RequestKillsWorkerError):
        await generate(pool, view.name, "die")
    assert len(executor.sent(Generate)) == 2
    with pytest.raises(RequestKillsWorkerError):
        await generate(pool, view.name, "die", priority=3)
    assert len(executor.sent(Generate)) == 2
    assert await generate(pool, view.name)


async def test_who_runs_beside_a_killer_is_not_blamed(
    pool: Pool, executor: FakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "BACKOFF_SECONDS", (0.0,))
    view = await load(pool)
    executor.hold(Generate)
    innocents = [asyncio.create_task(generate(pool, view.name, steps=steps)) for steps in (40, 50)]
    killer = asyncio.create_task(generate(pool, view.name, "die"))
    await soon(lambda: len(executor.sent(Generate)) == 3)
    executor.release()
    with pytest.raises(RequestKillsWorkerError):
        await killer
    assert [type(events[-1]) for events in await asyncio.gather(*innocents)] == [Summary, Summary]


async def test_who_wants_a_lost_pipeline_at_the_same_time_has_it_rebuilt_once(
    pool: Pool, executor: FakeExecutor
) -> None:
    views = [await load(pool) for _ in range(3)]
    executor.kill("workers/0")
    await settle()
    executor.log.clear()
    await asyncio.gather(*(generate(pool, view.name) for view in views for _ in range(4)))
    assert (len(executor.sent(Load)), len(executor.sent(Derive))) == (1, 2)


@pytest.mark.parametrize("leaves", [False, True])
async def test_deriving_what_is_being_rebuilt_makes_one_pipeline_of_the_name(
    pool: Pool, executor: FakeExecutor, leaves: bool
) -> None:
    await load(pool, pipeline_id="a")
    await pool.derive("pipelines/a", INPAINTING, Lease(pipeline_id="b"))
    executor.kill("workers/0")
    await soon(lambda: only_worker(pool).restart_count)
    await generate(pool, "pipelines/a")
    executor.hold(Load)
    rebuild = asyncio.create_task(generate(pool, "pipelines/b"))
    await settle()
    derived = asyncio.create_task(pool.derive("pipelines/a", INPAINTING, Lease(pipeline_id="b")))
    await settle()
    if leaves:
        rebuild.cancel()
        await asyncio.wait([rebuild])
    executor.release()
    assert (await derived).state is State.ACTIVE
    assert leaves or len(await rebuild)
    assert await generate(pool, "pipelines/b")


async def test_a_rebuild_waits_until_an_abandoned_one_is_cleared_away(pool: Pool, executor: FakeExecutor) -> None:
    view = await load(pool)
    executor.kill("workers/0")
    await soon(lambda: only_worker(pool).restart_count)
    executor.hold(Load, Unload)
    first = asyncio.create_task(generate(pool, view.name))
    await soon(lambda: len(executor.sent(Load)) == 2)
    first.cancel()
    await asyncio.wait([first])
    second = asyncio.create_task(generate(pool, view.name))
    await soon(lambda: executor.sent(Unload))
    await settle()
    assert len(executor.sent(Load)) == 2
    executor.release()
    assert await second
    assert await generate(pool, view.name)


async def test_what_a_worker_does_not_hold_after_all_is_built_again_once(pool: Pool, executor: FakeExecutor) -> None:
    view = await load(pool)
    executor.workers["workers/0"].pipelines.clear()
    assert all(await asyncio.gather(*(generate(pool, view.name) for _ in range(3))))
    assert len(executor.sent(Load)) == 2


async def test_what_waited_for_the_dead_worker_is_run_after_all(make_pool: MakePool, executor: FakeExecutor) -> None:
    pool = await make_pool(max_running=1)
    view = await load(pool)
    executor.hold(Generate)
    running = asyncio.create_task(generate(pool, view.name))
    await soon(lambda: executor.sent(Generate))
    waiting = asyncio.create_task(generate(pool, view.name))
    await soon(lambda: only_worker(pool).waiting_count)
    executor.kill("workers/0")
    await settle()
    executor.release()
    assert isinstance((await waiting)[-1], Summary)
    assert isinstance((await running)[-1], Summary)


async def test_an_engine_that_hangs_in_a_call_is_replaced(
    make_pool: MakePool, executor: FakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "BEAT_SECONDS", 0.001)
    pool = await make_pool(step_timeout=60)
    executor.turn_seconds = 59.0
    await asyncio.sleep(0.01)
    assert only_worker(pool).restart_count == 0
    executor.turn_seconds = 61.0
    await soon(lambda: pool.health().health != "ready")
    executor.turn_seconds = 0.0
    await soon(lambda: only_worker(pool).state is WorkerState.ACTIVE)
    assert only_worker(pool).restart_count


async def test_a_worker_that_keeps_dying_is_shown_as_failed(
    make_pool: MakePool, executor: FakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "BACKOFF_SECONDS", (0.0, 0.0, 0.0, 0.0, 60.0))
    pool = await make_pool()
    executor.failing_restarts = 100
    executor.kill("workers/0")
    await soon(lambda: only_worker(pool).state is WorkerState.FAILED)
    assert pool.health().health == "failing"
    assert not pool.is_serving


async def test_another_worker_takes_over_while_one_is_down(make_pool: MakePool) -> None:
    executor = FakeExecutor(2)
    executor.failing_restarts = 1000
    pool = await make_pool(executor)
    view = await load(pool)
    executor.kill("workers/0")
    await settle()
    await generate(pool, view.name)
    assert pool.get(view.name).worker == "workers/1"
    assert pool.is_serving


@pytest.mark.parametrize("error", [WorkerLostError("It ended."), BlockingIOError(11, "no process to spare")])
async def test_a_worker_that_does_not_come_up_is_tried_again(
    make_pool: MakePool, executor: FakeExecutor, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(supervision, "BACKOFF_SECONDS", (0.0,))
    executor.failing_restarts, executor.restart_error = 3, error
    pool = await make_pool()
    view = await load(pool)
    executor.kill("workers/0")
    await soon(lambda: not pool.is_serving)
    assert len(await generate(pool, view.name)) == 6
    assert executor.failing_restarts == 0
    assert pool.is_serving


async def test_without_any_worker_the_caller_is_told_to_try_again(make_pool: MakePool, executor: FakeExecutor) -> None:
    executor.failing_restarts = 1000
    pool = await make_pool(start_timeout=0.01)
    view = await load(pool)
    executor.kill("workers/0")
    with pytest.raises(WorkerLostError, match="restarted") as caught:
        await generate(pool, view.name)
    assert caught.value.retry_after
    assert pool.get(view.name).state is State.ACTIVE


# Unloading and leases


async def test_unloading_frees_what_nobody_shares_and_may_be_repeated(pool: Pool, executor: FakeExecutor) -> None:
    views = [await load(pool) for _ in range(2)]
    assert await pool.unload(views[0].name) == 0
    assert await pool.unload(views[1].name) == WEIGHT_BYTES
    assert await pool.unload(views[1].name) == 0
    assert executor.workers["workers/0"].pipelines == {}
    with pytest.raises(PipelineNotFoundError):
        pool.get(views[1].name)
    with pytest.raises(PipelineNotFoundError):
        await pool.unload("pipelines/never-there")


async def test_unloading_waits_for_what_runs_and_lets_nothing_new_in(pool: Pool, executor: FakeExecutor) -> None:
    view = await load(pool)
    executor.hold(Generate)
    running = asyncio.create_task(generate(pool, view.name))
    await soon(lambda: executor.sent(Generate))
    unloads = [asyncio.create_task(pool.unload(view.name)) for _ in range(2)]
    await settle()
    assert pool.get(view.name).state is State.UNLOADING
    with pytest.raises(PipelineNotFoundError):
        await generate(pool, view.name)
    assert executor.sent(Unload) == []
    executor.release()
    assert len(await running) == 5
    assert await asyncio.gather(*unloads) == [WEIGHT_BYTES, WEIGHT_BYTES]


async def test_unloading_waits_for_who_came_while_the_pipeline_was_lost(pool: Pool, executor: FakeExecutor) -> None:
    view = await load(pool)
    executor.kill("workers/0")
    await settle()
    executor.hold(Load)
    waiting = asyncio.create_task(generate(pool, view.name))
    await soon(lambda: len(executor.sent(Load)) == 2)
    unload = asyncio.create_task(pool.unload(view.name))
    await settle()
    executor.release()
    assert len(await waiting) == 6
    assert await unload == WEIGHT_BYTES


async def test_deriving_under_the_id_of_its_source_while_that_is_unloaded_does_not_hang(
    pool: Pool, executor: FakeExecutor
) -> None:
    await load(pool, pipeline_id="mine")
    executor.kill("workers/0")
    await settle()
    executor.hold(Load)
    derive = asyncio.create_task(pool.derive("pipelines/mine", INPAINTING, Lease(pipeline_id="mine")))
    await soon(lambda: len(executor.sent(Load)) == 2)
    unload = asyncio.create_task(pool.unload("pipelines/mine"))
    await settle()
    executor.release()
    await unload
    with pytest.raises(PipelineNotFoundError):
        await derive


async def test_unloading_by_force_ends_what_runs_and_waits(make_pool: MakePool, executor: FakeExecutor) -> None:
    pool = await make_pool(max_running=1)
    view = await load(pool)
    async with aclosing(hanging(pool, view.name)) as running, aclosing(hanging(pool, view.name)) as waiting:
        await anext(running)
        await anext(waiting)
        patient = asyncio.create_task(pool.unload(view.name))
        await settle()
        # Even with callers who read nothing.
        assert await pool.unload(view.name, force=True) == WEIGHT_BYTES
        assert await patient == WEIGHT_BYTES
        for events in (running, waiting):
            with pytest.raises(PipelineUnloadedError):
                async for _ in events:
                    pass


async def test_an_unload_goes_on_when_its_caller_leaves(pool: Pool, executor: FakeExecutor) -> None:
    view = await load(pool)
    executor.hold(Unload)
    unload = asyncio.create_task(pool.unload(view.name))
    await soon(lambda: executor.sent(Unload))
    unload.cancel()
    await asyncio.wait([unload])
    executor.release()
    await soon(lambda: names(pool) == [])


async def test_a_pipeline_that_is_being_loaded_can_be_unloaded(pool: Pool, executor: FakeExecutor) -> None:
    executor.hold(Load)
    loading = asyncio.create_task(load(pool, pipeline_id="mine"))
    await soon(lambda: executor.sent(Load))
    assert await pool.unload("pipelines/mine") == 0
    with pytest.raises(PipelineUnloadedError):
        await loading
    assert names(pool) == []


@pytest.mark.parametrize("force", [False, True])
async def test_unloading_what_is_being_loaded_waits_for_its_generations_unless_forced(
    pool: Pool, executor: FakeExecutor, force: bool
) -> None:
    executor.hold(Load)
    loading = asyncio.create_task(load(pool, pipeline_id="mine"))
    await soon(lambda: executor.sent(Load))
    generation = asyncio.create_task(generate(pool, "pipelines/mine"))
    await settle()
    unload = asyncio.create_task(pool.unload("pipelines/mine", force=force))
    with pytest.raises(PipelineUnloadedError):
        await loading
    await settle()
    assert generation.done() == force
    executor.release()
    if force:
        with pytest.raises(PipelineUnloadedError):
            await generation
    else:
        assert isinstance((await generation)[-1], Summary)
    await unload
    assert names(pool) == list(executor.workers["workers/0"].pipelines) == []


async def test_an_id_can_be_loaded_again_while_it_is_being_unloaded(pool: Pool, executor: FakeExecutor) -> None:
    await load(pool, pipeline_id="mine")
    executor.hold(Unload)
    unload = asyncio.create_task(pool.unload("pipelines/mine"))
    await soon(lambda: executor.sent(Unload))
    again = asyncio.create_task(load(pool, Spec("other"), pipeline_id="mine"))
    await settle()
    executor.release()
    assert await unload == WEIGHT_BYTES
    assert (await again).recipe.spec == Spec("other")
    assert executor.workers["workers/0"].pipelines == {"pipelines/mine": "other"}


async def test_unloading_what_was_lost_needs_no_worker(pool: Pool, executor: FakeExecutor) -> None:
    view = await load(pool)
    executor.kill("workers/0")
    await settle()
    assert await pool.unload(view.name) == 0


async def test_a_lease_that_runs_out_unloads_unless_the_pipeline_is_used(pool: Pool, executor: FakeExecutor) -> None:
    idle, used = await load(pool, ttl=60), await load(pool, ttl=60)
    async with aclosing(hanging(pool, used.name)) as running:
        await anext(running)
        pool.expire(time.time() + 59)
        await settle()
        assert len(names(pool)) == 2
        pool.expire(time.time() + 61)
        await soon(lambda: len(names(pool)) == 1)
    assert list(executor.workers["workers/0"].pipelines) == [used.name]
    with pytest.raises(PipelineNotFoundError):
        await generate(pool, idle.name)
    assert await pool.unload(idle.name) == 0


async def test_renewing_sets_the_lease_anew(pool: Pool) -> None:
    view = await load(pool, ttl=60)
    renewed = await pool.renew(view.name, 600)
    assert renewed.expire_time - renewed.last_use_time == pytest.approx(600)


# Watching


async def test_a_watch_begins_with_what_there_is_and_goes_on_with_what_changes(make_pool: MakePool) -> None:
    pool = await make_pool(publish_interval=0)
    first = await load(pool)
    changes: Any
    async with aclosing(pool.watch()) as changes:

        async def until(kind: ChangeKind, name: str) -> Any:
            async with asyncio.timeout(5):
                while (change := await anext(changes)).kind is not kind or change.pipeline.name != name:
                    pass
            return change.pipeline

        assert (await anext(changes)).pipeline == first
        assert (await anext(changes)).kind is ChangeKind.SYNCED
        second = await load(pool)
        assert (await until(ChangeKind.ADDED, second.name)).state is State.LOADING
        assert (await until(ChangeKind.MODIFIED, first.name)).shared_bytes == WEIGHT_BYTES
        await pool.renew(first.name, 5)
        assert (await until(ChangeKind.MODIFIED, first.name)).expire_time < second.expire_time
        await pool.unload(second.name)
        await until(ChangeKind.REMOVED, second.name)
        assert (await until(ChangeKind.MODIFIED, first.name)).exclusive_bytes == WEIGHT_BYTES


async def test_a_watch_of_workers_tells_of_each_change_once_and_ends_with_the_daemon(make_pool: MakePool) -> None:
    pool = await make_pool()
    views: Any
    async with aclosing(pool.watch_workers(0.0)) as views:
        async with asyncio.timeout(5):
            assert (await anext(views)).pipeline_count == 0
            await load(pool)
            while not (told := await anext(views)).snapshot or told.snapshot.weight_bytes != WEIGHT_BYTES:
                pass
            assert told.pipeline_count == 1
            waiting = asyncio.ensure_future(anext(views))
            await settle()
            assert not waiting.done(), "nothing has changed"
            await pool.drain(0)
            with pytest.raises(ShuttingDownError):
                await waiting


async def test_a_plan_is_made_where_the_pipeline_would_be(make_pool: MakePool) -> None:
    executor = FakeExecutor(workers=2)
    pool = await make_pool(executor)
    for _ in range(3):
        view = await load(pool, Spec("weights"))
    planned = await pool.plan(Spec("weights"))
    assert planned.worker == view.worker
    assert planned.planned.outcome is Outcome.FITS
    assert (await pool.plan(Spec("other"))).worker != view.worker
    assert len(names(pool)) == 3


async def test_changes_of_a_moment_reach_watchers_as_one(make_pool: MakePool) -> None:
    pool = await make_pool(publish_interval=0.05)
    view = await load(pool)
    async with aclosing(pool.watch()) as changes:
        for _ in range(2):
            await anext(changes)
        for ttl in range(10, 20):
            await pool.renew(view.name, ttl)
        seen, change = 0, None
        async with asyncio.timeout(5):
            while change is None or change.expire_time < pool.get(view.name).expire_time:
                change = (await anext(changes)).pipeline
                seen += 1
    assert seen < 10


async def test_a_watcher_who_does_not_keep_up_is_told_so(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchers, "MAX_PENDING", 3)
    view = await load(pool)
    async with aclosing(pool.watch()) as slow, aclosing(pool.watch()) as quick:
        assert (await anext(slow)).pipeline == view
        for _ in range(2):
            await anext(quick)
        for ttl in range(10, 20):
            await pool.renew(view.name, ttl)
            assert (await anext(quick)).kind is ChangeKind.MODIFIED
        with pytest.raises(WatchLaggedError):
            await anext(slow)


# The end


async def test_draining_finishes_what_runs_and_refuses_the_rest(make_pool: MakePool, executor: FakeExecutor) -> None:
    pool = await make_pool(max_running=1)
    view = await load(pool)
    executor.hold(Generate)
    running = asyncio.create_task(generate(pool, view.name))
    await soon(lambda: executor.sent(Generate))
    waiting = asyncio.create_task(generate(pool, view.name))
    executor.hold(Load)
    loading = asyncio.create_task(load(pool, Spec("other")))
    await soon(lambda: len(executor.sent(Load)) == 2)
    async with aclosing(pool.watch()) as changes:
        await anext(changes)
        drain = asyncio.create_task(pool.drain(60))
        for refused in (waiting, loading, generate(pool, view.name), load(pool)):
            with pytest.raises(ShuttingDownError):
                await refused
        assert not pool.is_serving
        assert not drain.done()
        assert only_worker(pool).state is WorkerState.DRAINING
        executor.release()
        assert len(await running) == 5
        await drain
        with pytest.raises(ShuttingDownError):
            async for _ in changes:
                pass


async def test_a_worker_that_dies_while_draining_is_not_brought_back(make_pool: MakePool) -> None:
    executor = FakeExecutor(workers=2)
    pool = await make_pool(executor)
    view = await load(pool)
    async with aclosing(hanging(pool, view.name)) as running:
        await anext(running)
        drain = asyncio.create_task(pool.drain(60))
        await settle()
        executor.kill("workers/1")
        await settle()
        workers, _ = pool.list_workers(page_size=0, page_token="")
        assert [worker.state for worker in workers] == [WorkerState.DRAINING, WorkerState.LOST]
        assert not pool.is_serving
    await drain


async def test_the_grace_ends(pool: Pool) -> None:
    view = await load(pool)
    async with aclosing(hanging(pool, view.name)) as running:
        await anext(running)
        await pool.drain(0.01)
        with pytest.raises(ShuttingDownError):
            async for _ in running:
                pass


def test_the_pool_needs_no_more_than_grpcio() -> None:
    program = """
import sys
for name in ("torch", "diffusers", "pydantic", "pydantic_settings", "prometheus_client", "psutil", "grpc_health"):
    sys.modules[name] = None
import denoised_server.pool, denoised_server.services, denoised_server.interceptors, denoised_server.executor.local
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)

"""Draining one worker: nothing new, what runs ends, its pipelines work elsewhere, and it can be undone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest
from denoised.errors import WorkerNotFoundError, WorkersDrainedError
from denoised_server.generation import Started, State, Summary, Terms
from denoised_server.messages import Generate, Load, Progress, Spec, Unload
from denoised_server.pool import Lease, Pool
from denoised_server.probes import Health

from tests.unit.fake_executor import FakeExecutor

A = "pipelines/a"


@pytest.fixture
def executor() -> FakeExecutor:
    return FakeExecutor(2)


@pytest.fixture
async def pool(executor: FakeExecutor) -> AsyncIterator[Pool]:
    pool = Pool(executor, max_running=1)
    await pool.start()
    async for _ in pool.load(Spec("weights"), Lease(pipeline_id="a")):
        pass
    yield pool
    await pool.stop()


async def events(pool: Pool, prompt: str = "a cat", name: str = A) -> AsyncGenerator[Any, None]:
    async with aclosing(pool.generate(Generate(name, {"prompt": prompt}))) as numbered:
        async for entry in numbered:
            yield entry.event


async def generate(pool: Pool) -> list[Any]:
    return [event async for event in events(pool)]


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110 - what is waited for is another's state
            await asyncio.sleep(0.001)


async def begin(running: AsyncGenerator[Any, None]) -> None:
    while not isinstance(await anext(running), Progress):
        pass


def state(pool: Pool, name: str) -> str:
    workers, _ = pool.list_workers(page_size=0, page_token="")
    return next(worker.state for worker in workers if worker.name == name)


async def test_what_runs_ends_well_and_what_comes_goes_elsewhere(pool: Pool, executor: FakeExecutor) -> None:
    async with aclosing(events(pool, "hang")) as running, aclosing(events(pool)) as waiting:
        await begin(running)
        await anext(waiting)
        waited = asyncio.create_task(anext(waiting))
        drain = asyncio.create_task(pool.drain_worker("workers/0"))
        await until(lambda: pool.get(A).worker == "workers/1")
        # The first still runs: neither that one nor whoever was behind it waits for the other.
        await waited
        assert isinstance([event async for event in waiting][-1], Summary)
        assert isinstance((await generate(pool))[-1], Summary)
        assert not drain.done()
        assert executor.workers["workers/0"].pipelines
        assert isinstance(await anext(running), Progress)
    assert (await drain).pipeline_count == 0
    assert not executor.workers["workers/0"].pipelines
    assert state(pool, "workers/0") == "draining"
    assert pool.health().health is Health.DEGRADED


async def test_a_load_that_is_under_way_ends_and_is_moved(pool: Pool, executor: FakeExecutor) -> None:
    executor.hold(Load)

    async def load() -> str:
        async for _ in pool.load(Spec("weights", task="inpainting"), Lease(pipeline_id="b")):
            pass
        return pool.get("pipelines/b").name

    loading = asyncio.create_task(load())
    await until(lambda: len(executor.sent(Load)) == 2)
    drain = asyncio.create_task(pool.drain_worker("workers/0"))
    await asyncio.sleep(0.01)
    assert not drain.done()
    executor.release()
    assert await loading == "pipelines/b"
    await drain
    assert not executor.workers["workers/0"].pipelines


async def test_without_another_worker_callers_are_told_and_so_are_probes(pool: Pool) -> None:
    for name in ("workers/0", "workers/1", "workers/0"):
        await pool.drain_worker(name)
    assert pool.health().health is Health.DRAINING
    with pytest.raises(WorkersDrainedError) as told:
        await generate(pool)
    assert told.value.retry_after
    pool.resume_worker("workers/1")
    assert isinstance((await generate(pool))[-1], Summary)
    assert pool.get(A).worker == "workers/1"


async def test_a_pinned_pipeline_moves_at_once_and_comes_back_when_there_is_a_worker(pool: Pool) -> None:
    await pool.renew(A, None, pinned=True)
    await pool.drain_worker("workers/0")
    await until(lambda: pool.get(A).worker == "workers/1")
    await pool.drain_worker("workers/1")
    assert not pool.get(A).worker
    pool.resume_worker("workers/0")
    await until(lambda: pool.get(A).worker == "workers/0")


async def test_a_drain_that_is_undone_leaves_pipelines_where_they_are(pool: Pool, executor: FakeExecutor) -> None:
    async with aclosing(events(pool, "hang")) as running:
        await begin(running)
        drain = asyncio.create_task(pool.drain_worker("workers/0"))
        await until(lambda: not pool.get(A).worker)
        pool.resume_worker("workers/0")
        await drain
        assert (pool.get(A).worker, state(pool, "workers/0")) == ("workers/0", "active")
    assert isinstance((await generate(pool))[-1], Summary)
    assert not executor.sent(Unload)


async def test_a_drain_that_is_undone_while_it_unloads_leaves_nothing_that_nobody_has(
    pool: Pool, executor: FakeExecutor
) -> None:
    for name in "bcd":
        async for _ in pool.load(Spec("weights"), Lease(pipeline_id=name)):
            pass
    executor.hold(Unload)
    drain = asyncio.create_task(pool.drain_worker("workers/0"))
    await until(lambda: bool(executor.sent(Unload)))
    pool.resume_worker("workers/0")
    await drain
    held = {f"pipelines/{name}" for name in "abcd" if pool.get(f"pipelines/{name}").worker}
    assert len(held) == 3
    executor.release()
    await until(lambda: set(executor.workers["workers/0"].pipelines) == held)
    for name in "abcd":
        assert isinstance([event async for event in events(pool, name=f"pipelines/{name}")][-1], Summary)


async def test_what_is_unloaded_during_a_drain_does_not_wait_for_its_end(pool: Pool, executor: FakeExecutor) -> None:
    async for _ in pool.load(Spec("weights"), Lease(pipeline_id="b")):
        pass
    async with aclosing(events(pool, "hang")) as running:
        await begin(running)
        drain = asyncio.create_task(pool.drain_worker("workers/0"))
        await until(lambda: not pool.get("pipelines/b").worker)
        await pool.unload("pipelines/b")
        assert set(executor.workers["workers/0"].pipelines) == {A}
    await drain
    assert len(executor.sent(Unload)) == 2


async def test_who_waits_for_a_pipeline_that_is_unloaded_waits_on(pool: Pool, executor: FakeExecutor) -> None:
    async for _ in pool.load(Spec("weights"), Lease(pipeline_id="b")):
        pass
    async with aclosing(events(pool, "hang")) as running:
        await begin(running)
        waiting = [asyncio.create_task(generate(pool)) for _ in range(3)]
        await until(lambda: pool.get(A).generation_count == 4)
        unload = asyncio.create_task(pool.unload(A))
        await asyncio.sleep(0)
        drain = asyncio.create_task(pool.drain_worker("workers/0"))
        await until(lambda: not pool.get("pipelines/b").worker)
        await asyncio.sleep(0.01)
        assert len(executor.sent(Generate)) == 1, "there is one place"
    assert all(isinstance(run[-1], Summary) for run in await asyncio.gather(*waiting))
    await drain
    assert unload.done()
    assert not executor.workers["workers/0"].pipelines


async def test_what_was_promised_to_go_on_without_its_caller_waits_for_a_worker(pool: Pool) -> None:
    detached = Terms(detached=True)
    async with aclosing(events(pool, "hang")) as running:
        await begin(running)
        async with aclosing(pool.generate(Generate(A, {"prompt": "a cat"}), detached)) as accepted:
            started = (await anext(accepted)).event
        assert isinstance(started, Started)
        await pool.drain_worker("workers/1")
        drain = asyncio.create_task(pool.drain_worker("workers/0"))
        await until(lambda: not pool.get(A).worker)
        await asyncio.sleep(0.01)
    await drain
    assert pool.get_generation(started.name).state is State.WAITING
    # Nothing is promised now.
    with pytest.raises(WorkersDrainedError):
        await anext(pool.generate(Generate(A, {"prompt": "a cat"}), detached))
    assert len(pool.list_generations(page_size=0, page_token="")[0]) == 1
    pool.resume_worker("workers/1")
    await until(lambda: pool.get_generation(started.name).state is State.SUCCEEDED)


async def test_one_task_brings_a_pinned_pipeline_back(pool: Pool, executor: FakeExecutor) -> None:
    executor.hold(Load)
    executor.kill("workers/0")
    await until(lambda: state(pool, "workers/0") == "active")
    for _ in range(5):
        await pool.renew(A, None, pinned=True)
    assert len([task for task in asyncio.all_tasks() if task.get_name() == f"return of {A}"]) == 1
    executor.release()
    await until(lambda: bool(pool.get(A).worker))


async def test_a_drain_outlives_its_caller_and_the_workers_death(pool: Pool, executor: FakeExecutor) -> None:
    async with aclosing(events(pool, "hang")) as running:
        await begin(running)
        drain = asyncio.create_task(pool.drain_worker("workers/0"))
        await until(lambda: state(pool, "workers/0") == "draining")
        drain.cancel()
    await until(lambda: not executor.workers["workers/0"].pipelines)
    executor.kill("workers/0")
    await until(lambda: state(pool, "workers/0") == "draining" and executor.workers["workers/0"].is_alive)
    assert isinstance((await generate(pool))[-1], Summary)
    assert pool.get(A).worker == "workers/1"


async def test_there_is_no_other_worker(pool: Pool) -> None:
    with pytest.raises(WorkerNotFoundError):
        await pool.drain_worker("workers/7")
    with pytest.raises(WorkerNotFoundError):
        pool.resume_worker("pipelines/a")

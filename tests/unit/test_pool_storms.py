"""The pool in storms: callers that come, leave and insist, workers that die, all at random. Nothing is left over."""

from __future__ import annotations

import asyncio
import random

import pytest
from denoised.errors import DenoisedError, WorkerLostError
from denoised_server import supervision
from denoised_server.handles import State
from denoised_server.messages import Derivation, Derive, Generate, Load, Spec, Unload
from denoised_server.pool import Lease, Pool
from denoised_server.views import PipelineView, WorkerView

from tests.unit.fake_executor import FakeExecutor

CALLERS = 40
IDS = ("", "", "one", "two", "three")


async def caller(pool: Pool, dice: random.Random) -> None:
    """Does one thing and may leave in the middle of it."""
    name = f"pipelines/{dice.choice(IDS[2:])}"
    lease = Lease(pipeline_id=dice.choice(IDS), request_id=dice.choice(("", "", "r1", "r2")))
    prompt = dice.choice(("a cat", "a cat", "hang", "bug"))

    async def load() -> None:
        async for _ in pool.load(Spec(dice.choice(("cat", "cat", "dog", "absent"))), lease):
            pass

    async def generate() -> None:
        async for _ in pool.generate(Generate(name, {"prompt": prompt}, priority=dice.randint(-1, 1))):
            pass

    act = dice.choice(
        (
            load,
            load,
            generate,
            generate,
            lambda: pool.derive(name, Derivation("inpainting"), lease),
            lambda: pool.unload(name, force=dice.random() < 0.5),
        )
    )
    task = asyncio.ensure_future(act())
    await asyncio.wait([task], timeout=None if prompt != "hang" and dice.random() < 0.5 else dice.random() / 50)
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()) is not None:
        assert isinstance(error, DenoisedError), error


async def weather(executor: FakeExecutor, dice: random.Random) -> None:
    """Slows commands down, and kills workers."""
    while True:
        executor.hold(*dice.sample((Load, Derive, Generate, Unload), 2))
        await asyncio.sleep(dice.random() / 200)
        executor.release()
        await asyncio.sleep(0)
        if dice.random() < 0.3:
            alive = [worker.name for worker in executor.workers.values() if worker.is_alive]
            if alive:
                executor.kill(dice.choice(alive))


def held(pool: Pool) -> dict[str, set[str]]:
    """Pipelines by worker, as the pool has it."""
    found = views(pool)
    return {worker.name: {view.name for view in found if view.worker == worker.name} for worker in workers(pool)}


@pytest.mark.parametrize("seed", range(25))
async def test_nothing_is_left_over(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "BACKOFF_SECONDS", (0.0, 0.001))
    dice = random.Random(seed)
    executor = FakeExecutor(2)
    pool = Pool(executor, max_running=2, max_waiting=5)
    await pool.start()
    storm = asyncio.create_task(weather(executor, dice))
    async with asyncio.timeout(20):
        await asyncio.gather(*(caller(pool, random.Random(1000 * seed + number)) for number in range(CALLERS)))
        storm.cancel()
        await asyncio.wait([storm])
        executor.release()
        await pool.until(lambda: all(view.state is State.ACTIVE for view in views(pool)))
        await pool.until(lambda: all(worker.state == "active" for worker in workers(pool)))
        # A rebuild that nobody waits for any more is cleared away after its last caller has left.
        while held(pool) != {name: set(worker.pipelines) for name, worker in executor.workers.items()}:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert all((worker.running_count, worker.waiting_count) == (0, 0) for worker in workers(pool))
    for view in views(pool):
        assert view.generation_count == 0
        async for _ in pool.generate(Generate(view.name, {"prompt": "a cat"})):
            pass
        await pool.unload(view.name)
    assert views(pool) == []
    assert not any(worker.pipelines for worker in executor.workers.values())
    await pool.stop()


def views(pool: Pool) -> list[PipelineView]:
    return pool.list_pipelines(page_size=500, page_token="")[0]


def workers(pool: Pool) -> list[WorkerView]:
    return pool.list_workers(page_size=0, page_token="")[0]


async def test_a_storm_can_kill() -> None:
    """That the weather above is bad enough."""
    executor = FakeExecutor(1)
    pool = Pool(executor)
    await pool.start()
    executor.kill("workers/0")
    with pytest.raises(WorkerLostError):
        await anext(executor.submit("workers/0", Load("pipelines/a", None)))  # type: ignore[arg-type]
    await pool.stop()

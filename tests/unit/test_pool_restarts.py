"""The pool over a journal: what is there when its process has ended and the next one starts."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from denoised.errors import JournalUnavailableError, PipelineExistsError, PipelineNotFoundError
from denoised_server import journal as journal_module
from denoised_server import pool as pool_module
from denoised_server.handles import State
from denoised_server.journal import FILE, Journal
from denoised_server.messages import Derivation, Hold, Keep, Load, Spec, Unload
from denoised_server.pool import Lease, Pool

from tests.unit.fake_executor import FakeExecutor
from tests.unit.test_pool import generate, load, names, settle, soon


@asynccontextmanager
async def life(state_dir: Path, executor: FakeExecutor | None = None, **settings: Any) -> AsyncIterator[Pool]:
    """One process of the daemon."""
    pool = Pool(executor or FakeExecutor(), journal=Journal(state_dir), **settings)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.stop()


async def test_handles_outlive_the_process_and_are_built_at_their_next_use(tmp_path: Path) -> None:
    async with life(tmp_path) as pool:
        first = await load(pool, Spec("cat", overrides={"safety_checker": None}), ttl=3600, request_id="r1")
        derived = await pool.derive(first.name, Derivation("inpainting"), Lease(pipeline_id="painter"))
    executor = FakeExecutor()
    async with life(tmp_path, executor) as pool:
        assert names(pool) == [first.name, "pipelines/painter"]
        assert executor.sent(Load) == []
        found = pool.get(first.name)
        assert (found.recipe, found.loaded, found.worker) == (first.recipe, first.loaded, "")
        assert found.create_time == first.create_time
        assert abs(found.expire_time - first.expire_time) < 1
        assert pool.get(derived.name).source == first.name
        assert len(await generate(pool, derived.name)) == 6
        # The same request, the same id, and another number than those there were.
        assert (await load(pool, Spec("cat", overrides={"safety_checker": None}), request_id="r1")).name == first.name
        with pytest.raises(PipelineExistsError):
            await load(pool, Spec("dog"), pipeline_id="painter")
        assert names(pool)[-1] == "pipelines/painter"
        last = await load(pool)
        assert names(pool)[-1] == last.name


async def test_what_was_unloaded_stays_away_and_can_be_unloaded_again(tmp_path: Path) -> None:
    async with life(tmp_path) as pool:
        view = await load(pool)
        await pool.unload(view.name)
    async with life(tmp_path) as pool:
        assert names(pool) == []
        assert await pool.unload(view.name) == 0
        with pytest.raises(PipelineNotFoundError):
            await generate(pool, view.name)


async def test_leases_go_on_while_no_daemon_runs(tmp_path: Path) -> None:
    async with life(tmp_path) as pool:
        brief, long = await load(pool, ttl=1), await load(pool, ttl=60)
        await pool.renew(long.name, 7200)
    async with life(tmp_path) as pool:
        pool.expire(time.time() + 3600)
        await soon(lambda: names(pool) == [long.name])
        assert brief.name not in names(pool)


async def test_a_use_is_noted(tmp_path: Path) -> None:
    async with life(tmp_path) as pool:
        view = await load(pool)
        await asyncio.sleep(0.01)
        await generate(pool, view.name)
        used = pool.get(view.name).last_use_time
        assert used > view.last_use_time
    async with life(tmp_path) as pool:
        assert pool.get(view.name).last_use_time == used


async def test_a_pinned_pipeline_is_back_at_once_and_never_expires(tmp_path: Path) -> None:
    async with life(tmp_path) as pool:
        view = await load(pool, ttl=1, pinned=True)
        pool.expire(time.time() + 3600)
        await settle()
        assert pool.get(view.name).state is State.ACTIVE
    executor = FakeExecutor()
    async with life(tmp_path, executor) as pool:
        await soon(lambda: pool.get(view.name).worker)
        executor.kill("workers/0")
        await soon(lambda: len(executor.sent(Load)) == 2 and pool.get(view.name).worker)
        assert not (await pool.renew(view.name, None, pinned=False)).pinned
        pool.expire(time.time() + 3600)
        await soon(lambda: names(pool) == [])


async def test_how_a_pipeline_is_kept_outlives_the_process_and_reaches_its_worker(tmp_path: Path) -> None:
    executor = FakeExecutor()
    async with life(tmp_path, executor) as pool:
        view = await load(pool, keep_alive=30)
        assert executor.sent(Load)[-1].keep == Keep(keep_alive=30)
        assert (await pool.renew(view.name, None, keep_alive=5)).keep_alive == 5
        assert [each.keep for each in executor.sent(Hold)] == [Keep(keep_alive=5)]
        await pool.renew(view.name, 60)
        assert len(executor.sent(Hold)) == 1
        derived = await pool.derive(view.name, Derivation("inpainting"), Lease())
        assert derived.keep_alive is None
    executor = FakeExecutor()
    async with life(tmp_path, executor) as pool:
        await generate(pool, view.name)
        assert executor.sent(Load)[-1].keep == Keep(keep_alive=5)
        assert (await pool.renew(view.name, None, keep_alive=-1)).keep_alive is None


async def test_a_load_that_nobody_was_told_of_does_not_come_back(tmp_path: Path) -> None:
    executor = FakeExecutor()
    async with life(tmp_path, executor) as pool:
        executor.hold(Load)
        loading = asyncio.create_task(load(pool, pipeline_id="mine"))
        await soon(lambda: executor.sent(Load))
        loading.cancel()
        await asyncio.wait([loading])
    async with life(tmp_path) as pool:
        assert names(pool) == []


async def test_what_the_journal_cannot_have_is_not_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "BUSY_SECONDS", 0.01)
    executor = FakeExecutor()
    async with life(tmp_path, executor) as pool:
        kept = await load(pool)
        with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for refused in (
                load(pool, Spec("dog"), pipeline_id="dog"),
                pool.derive(kept.name, Derivation("inpainting"), Lease()),
                pool.renew(kept.name, 60),
                pool.unload(kept.name),
            ):
                with pytest.raises(JournalUnavailableError):
                    await refused
            await soon(lambda: names(pool) == [kept.name])
            # What was there works on.
            assert await generate(pool, kept.name)
            assert list(executor.workers["workers/0"].pipelines) == [kept.name]
            other.execute("ROLLBACK")
        assert (await load(pool, Spec("dog"), pipeline_id="dog")).state is State.ACTIVE
        assert await pool.unload(kept.name) > 0
    async with life(tmp_path) as pool:
        assert names(pool) == ["pipelines/dog"]


async def test_what_could_not_be_kept_goes_without_anything_else_happening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "BUSY_SECONDS", 0.01)
    async with life(tmp_path) as pool:
        with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(JournalUnavailableError):
                await load(pool, pipeline_id="mine")
            await soon(lambda: names(pool) == [])


async def test_who_lost_the_connection_finds_the_load_going_on(executor: FakeExecutor, lone: Pool) -> None:
    executor.hold(Load)
    first = asyncio.create_task(load(lone, request_id="r1"))
    await soon(lambda: executor.sent(Load))
    first.cancel()
    await asyncio.wait([first])
    second = asyncio.create_task(load(lone, request_id="r1"))
    await settle()
    executor.release()
    assert (await second).state is State.ACTIVE
    assert len(executor.sent(Load)) == 1
    assert not executor.cancelled


@pytest.mark.parametrize("is_done", [False, True])
async def test_who_does_not_come_back_in_time_has_nothing(
    executor: FakeExecutor, lone: Pool, monkeypatch: pytest.MonkeyPatch, is_done: bool
) -> None:
    monkeypatch.setattr(pool_module, "REJOIN_SECONDS", 0.02)
    executor.hold(Load)
    first = asyncio.create_task(load(lone, request_id="r1"))
    await soon(lambda: executor.sent(Load))
    first.cancel()
    if is_done:
        executor.release()
    await soon(lambda: names(lone) == [])
    executor.release()
    assert [type(command) for command in executor.cancelled] == ([] if is_done else [Load])
    assert not is_done or executor.sent(Unload)


async def test_a_load_that_goes_on_without_its_caller_can_be_unloaded(executor: FakeExecutor, lone: Pool) -> None:
    executor.hold(Load)
    first = asyncio.create_task(load(lone, request_id="r1", pipeline_id="mine"))
    await soon(lambda: executor.sent(Load))
    first.cancel()
    await asyncio.wait([first])
    assert await lone.unload("pipelines/mine") == 0
    assert names(lone) == []


@pytest.fixture
def executor() -> FakeExecutor:
    return FakeExecutor()


@pytest.fixture
async def lone(executor: FakeExecutor) -> AsyncIterator[Pool]:
    pool = Pool(executor)
    await pool.start()
    yield pool
    await pool.stop()

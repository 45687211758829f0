"""Generations that go on without their callers: by name, over deaths, for a time and within a size."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
from denoised.errors import (
    GenerationCancelledError,
    GenerationNotFoundError,
    InternalError,
    InvalidFieldError,
    PipelineNotFoundError,
    ShuttingDownError,
)
from denoised_server.generation import GenerationEvent, Started, State, Summary, Terms
from denoised_server.messages import Generate, Output, Progress
from denoised_server.pool import Pool
from denoised_server.retention import Result, Retention

from tests.unit.fake_executor import FakeExecutor
from tests.unit.test_pool import load, soon
from tests.unit.test_pool_restarts import life

DETACHED = Terms(detached=True)


def command(name: str, prompt: str = "a cat", steps: int = 3) -> Generate:
    return Generate(name, {"prompt": prompt, "num_inference_steps": steps})


async def submit(pool: Pool, name: str, prompt: str = "a cat", terms: Terms = DETACHED, steps: int = 3) -> str:
    """Starts a generation and leaves."""
    async with aclosing(pool.generate(command(name, prompt, steps), terms)) as events:
        started = (await anext(events)).event
    assert isinstance(started, Started)
    return started.name


async def read(pool: Pool, name: str, after: int = 0) -> list[GenerationEvent]:
    async with aclosing(pool.resume_generation(name, after)) as events:
        return [entry.event async for entry in events]


async def over(pool: Pool, name: str) -> None:
    await soon(lambda: pool.get_generation(name).end_time and pool.get_generation(name).size_bytes)


@pytest.fixture
def executor() -> FakeExecutor:
    return FakeExecutor()


@pytest.fixture
async def pool(executor: FakeExecutor) -> AsyncIterator[Pool]:
    pool = Pool(executor)
    await pool.start()
    yield pool
    await pool.stop()


async def test_it_goes_on_without_its_caller_and_its_result_waits(pool: Pool, executor: FakeExecutor) -> None:
    view = await load(pool)
    executor.hold(Generate)
    name = await submit(pool, view.name)
    assert pool.get_generation(name).state in (State.WAITING, State.RUNNING)
    executor.release()
    await over(pool, name)
    found = pool.get_generation(name)
    assert (found.state, found.progress, found.pipeline) == (State.SUCCEEDED, Progress(3, 3), view.name)
    assert found.expire_time > found.end_time
    events = await read(pool, name)
    assert [type(event) for event in events] == [Started, Progress, Progress, Progress, Output, Summary]
    assert await read(pool, name, after=3) == events[3:]
    assert pool.list_generations(page_size=0, page_token="") == ([found], "")


async def test_a_reader_joins_one_that_runs_and_misses_nothing(pool: Pool, executor: FakeExecutor) -> None:
    view = await load(pool)
    executor.hold(Generate)
    name = await submit(pool, view.name)
    readers = [asyncio.create_task(read(pool, name)) for _ in range(2)]
    await asyncio.sleep(0)
    executor.release()
    one, other = await asyncio.gather(*readers)
    assert one == other
    assert isinstance(one[-1], Summary)


async def test_one_that_is_not_detached_ends_with_its_last_reader(pool: Pool, executor: FakeExecutor) -> None:
    view = await load(pool)
    async with aclosing(pool.generate(command(view.name, "hang"))) as events:
        started = (await anext(events)).event
        assert isinstance(started, Started)
        async with aclosing(pool.resume_generation(started.name, 0)) as other:
            await anext(other)
            await events.aclose()
            assert isinstance((await anext(other)).event, Progress)
    await soon(lambda: executor.cancelled)
    with pytest.raises(GenerationNotFoundError):
        pool.get_generation(started.name)


async def test_a_request_sent_again_joins_and_after_its_end_has_the_result(pool: Pool, executor: FakeExecutor) -> None:
    view = await load(pool)
    terms = Terms("r1", detached=True)
    executor.hold(Generate)
    name = await submit(pool, view.name, terms=terms)
    assert await submit(pool, view.name, terms=terms) == name
    with pytest.raises(InvalidFieldError):
        await submit(pool, view.name, "a dog", terms=terms)
    executor.release()
    await over(pool, name)
    assert await submit(pool, view.name, terms=terms) == name
    with pytest.raises(InvalidFieldError):
        await submit(pool, view.name, "a dog", terms=terms)
    assert len(executor.sent(Generate)) == 1


async def test_cancelling_by_name(pool: Pool, executor: FakeExecutor) -> None:
    view = await load(pool)
    name = await submit(pool, view.name, "hang")
    reader = asyncio.create_task(read(pool, name))
    await soon(lambda: pool.get_generation(name).progress)
    assert pool.cancel_generation(name).state is State.CANCELLED
    with pytest.raises(GenerationCancelledError):
        await reader
    await over(pool, name)
    with pytest.raises(GenerationCancelledError):
        await read(pool, name)
    assert pool.cancel_generation(name).state is State.CANCELLED


async def test_a_failure_is_kept_with_its_reason(pool: Pool) -> None:
    view = await load(pool)
    name = await submit(pool, view.name, "bug")
    await over(pool, name)
    found = pool.get_generation(name)
    assert (found.state, found.error_reason) == (State.FAILED, "INTERNAL")
    with pytest.raises(InternalError):
        await read(pool, name)


async def test_results_outlive_the_process_and_what_was_not_done_is_done(tmp_path: Path) -> None:
    async with life(tmp_path) as pool:
        view = await load(pool)
        done = await submit(pool, view.name, terms=Terms("r1", detached=True))
        await over(pool, done)
        events = await read(pool, done)
        endless = await submit(pool, view.name, "hang", steps=4)
        await soon(lambda: pool.get_generation(endless).progress)
        seeds = pool.get_generation(endless).seeds
        reader = asyncio.create_task(read(pool, endless))
        await asyncio.sleep(0)
        await pool.drain(0.01)
        with pytest.raises(ShuttingDownError):
            await reader
    executor = FakeExecutor()
    async with life(tmp_path, executor) as pool:
        assert await read(pool, done) == events
        assert await submit(pool, view.name, terms=Terms("r1", detached=True)) == done
        await soon(lambda: executor.sent(Generate))
        (again,) = executor.sent(Generate)
        assert (again.arguments["prompt"], again.seeds) == ("hang", seeds)
        await soon(lambda: pool.get_generation(endless).progress)
        pool.cancel_generation(endless)
        await over(pool, endless)
    async with life(tmp_path) as pool:
        assert pool.get_generation(endless).state is State.CANCELLED
        assert [view.name for view in pool.list_generations(page_size=0, page_token="")[0]] == [done, endless]


async def test_without_kept_requests_a_generation_ends_with_the_process(tmp_path: Path) -> None:
    async with life(tmp_path, keep_requests=False) as pool:
        view = await load(pool)
        name = await submit(pool, view.name, "hang")
        await pool.drain(0.0)
    assert not any(b"hang" in path.read_bytes() for path in tmp_path.iterdir())  # noqa: ASYNC240
    async with life(tmp_path) as pool:
        assert pool.get_generation(name).state is State.FAILED


async def test_without_kept_requests_a_result_does_not_say_what_was_asked(tmp_path: Path) -> None:
    async with life(tmp_path, keep_requests=False) as pool:
        view = await load(pool)
        name = await submit(pool, view.name, "a secret wish")
        await over(pool, name)
        summary = (await read(pool, name))[-1]
        assert isinstance(summary, Summary)
        assert not summary.making.command.arguments
    # The toy's picture is its prompt.
    assert not any(b'"prompt":"a secret wish"' in path.read_bytes() for path in tmp_path.iterdir())  # noqa: ASYNC240


async def test_one_whose_pipeline_is_gone_fails(tmp_path: Path) -> None:
    async with life(tmp_path) as pool:
        view = await load(pool)
        name = await submit(pool, view.name, "hang")
        await pool.drain(0.0)
        await pool._journal.forget_pipeline(view.name)
    async with life(tmp_path) as pool:
        with pytest.raises(PipelineNotFoundError):
            await read(pool, name)


async def test_results_are_kept_for_a_time(tmp_path: Path) -> None:
    async with life(tmp_path, results_ttl=0.0) as pool:
        view = await load(pool)
        name = await submit(pool, view.name)
        await soon(lambda: pool.get_generation(name).end_time)
        await pool._detached.tidy(pool.get_generation(name).end_time + 1)
        await soon(lambda: not pool.list_generations(page_size=0, page_token="")[0] or not pool._generations)
        await pool._detached.tidy(10**12)
        with pytest.raises(GenerationNotFoundError):
            pool.get_generation(name)


@pytest.mark.parametrize(
    ("max_bytes", "now", "gone"),
    [
        (100, 10.0, []),
        (60, 10.0, ["old"]),
        (30, 10.0, ["middle", "old"]),
        (0, 10.0, ["new", "middle", "old"]),
        (100, 12.0, ["old"]),
        (100, 99.0, ["new", "middle", "old"]),
    ],
)
def test_the_oldest_results_go_first(max_bytes: int, now: float, gone: list[str]) -> None:
    results = [Result("old", 30, 1.0), Result("new", 30, 3.0), Result("middle", 30, 2.0)]
    assert Retention(ttl=11.0, max_bytes=max_bytes).surplus(results, now) == gone


async def test_what_is_no_name_is_refused(pool: Pool) -> None:
    with pytest.raises(InvalidFieldError):
        pool.get_generation("a")
    with pytest.raises(GenerationNotFoundError):
        await read(pool, "generations/absent")

"""Deadlines over a fake executor: kept by the daemon itself wherever a generation is, and refused where hopeless."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from denoised.errors import DeadlineExceededError, DeadlineTooShortError, DeadlineUnmeetableError
from denoised.v1 import generation_service_pb2 as pb
from denoised_server import requests
from denoised_server.generation import Queued, State, Summary, Terms
from denoised_server.messages import Generate, Load, Unload
from denoised_server.pool import Pool

from tests.unit.fake_executor import FakeExecutor
from tests.unit.test_pool import events, generate, hanging, load, only_worker, settle, soon


@pytest.fixture
def executor() -> FakeExecutor:
    return FakeExecutor()


@pytest.fixture
async def pool(executor: FakeExecutor) -> AsyncIterator[Pool]:
    pool = Pool(executor, max_running=1)
    await pool.start()
    yield pool
    await pool.stop()


async def fail(pool: Pool, command: Generate, terms: Terms | None = None) -> Exception:
    """What a generation ends with, to a caller who reads to the end."""
    try:
        async for _ in events(pool, command, terms or Terms()):
            pass
    except Exception as error:
        return error
    raise AssertionError("it ended well")


async def test_one_that_runs_is_stopped_and_says_how_far_it_was(pool: Pool, executor: FakeExecutor) -> None:
    view = await load(pool)
    error = await fail(pool, Generate(view.name, {"prompt": "hang"}, timeout=0.05))
    assert isinstance(error, DeadlineExceededError)
    assert " steps" in error.message
    await soon(lambda: executor.cancelled)
    assert only_worker(pool).running_count == 0


async def test_one_that_waits_leaves_the_line(pool: Pool, executor: FakeExecutor) -> None:
    view = await load(pool)
    async with aclosing(hanging(pool, view.name)) as running:
        await anext(running)
        error = await fail(pool, Generate(view.name, {}, timeout=0.05))
        assert isinstance(error, DeadlineExceededError)
        assert "waited" in error.message
        assert only_worker(pool).waiting_count == 0
    assert len(executor.sent(Generate)) == 1


async def test_one_that_waits_for_its_pipeline_leaves_the_load_to_others(pool: Pool, executor: FakeExecutor) -> None:
    executor.hold(Load)
    loading = asyncio.create_task(load(pool, pipeline_id="mine"))
    await soon(lambda: executor.sent(Load))
    assert isinstance(await fail(pool, Generate("pipelines/mine", {}, timeout=0.05)), DeadlineExceededError)
    executor.release()
    assert (await loading).name == "pipelines/mine"
    assert executor.sent(Unload) == []


async def test_one_whose_caller_has_left_has_its_own_time(pool: Pool, executor: FakeExecutor) -> None:
    view = await load(pool)
    async with aclosing(
        pool.generate(Generate(view.name, {"prompt": "hang"}, timeout=0.05), Terms("mine", detached=True))
    ) as numbered:
        name: Any = (await anext(numbered)).event
    await soon(lambda: pool.get_generation(name.name).state is State.FAILED)
    assert pool.get_generation(name.name).error_reason == "DEADLINE_EXCEEDED"


async def test_what_is_in_time_is_not_disturbed(pool: Pool) -> None:
    view = await load(pool)
    assert isinstance((await generate(pool, view.name, timeout=30.0))[-1], Summary)
    await settle()


async def test_before_the_first_has_ended_nobody_is_refused(pool: Pool, executor: FakeExecutor) -> None:
    view = await load(pool)
    executor.hold(Generate)
    await fail(pool, Generate(view.name, {}, timeout=0.01))
    assert len(executor.sent(Generate)) == 1


async def test_what_has_been_seen_to_take_longer_is_refused_at_once(pool: Pool, executor: FakeExecutor) -> None:
    view = await load(pool)
    # A fake generation says that it ran for a quarter of a second.
    await generate(pool, view.name)
    error = await fail(pool, Generate(view.name, {"prompt": "a cat"}, timeout=0.2))
    assert isinstance(error, DeadlineTooShortError)
    assert len(executor.sent(Generate)) == 1
    assert isinstance((await generate(pool, view.name, timeout=0.3))[-1], Summary)


async def test_who_would_wait_too_long_is_refused_at_once_and_told_when_to_come_back(
    pool: Pool, executor: FakeExecutor
) -> None:
    view = await load(pool)
    await generate(pool, view.name)
    async with aclosing(hanging(pool, view.name)) as running, aclosing(hanging(pool, view.name)) as waiting:
        await anext(running)
        first: Any = await anext(waiting)
        assert first == Queued(0)
        assert first.expected_start_time <= time.time() + 0.25
        error = await fail(pool, Generate(view.name, {"prompt": "a cat"}, timeout=0.3))
        assert isinstance(error, DeadlineUnmeetableError)
        assert error.retry_after
        assert only_worker(pool).waiting_count == 1
        urgent = await fail(pool, Generate(view.name, {"prompt": "a cat"}, timeout=0.6, priority=9))
        assert type(urgent) is DeadlineExceededError


@pytest.mark.parametrize(
    ("own", "left", "detached", "limit"),
    [
        (None, None, False, None),
        (None, 3.0, False, 3.0),
        (5.0, None, False, 5.0),
        (5.0, 3.0, False, 3.0),
        (2.0, 3.0, False, 2.0),
        (None, 3.0, True, None),
        (5.0, 3.0, True, 5.0),
    ],
)
def test_the_earlier_of_two_deadlines_counts_and_the_calls_only_while_there_is_one(
    own: float | None, left: float | None, detached: bool, limit: float | None
) -> None:
    request = pb.GenerateRequest(on_disconnect=pb.ON_DISCONNECT_DETACH if detached else pb.ON_DISCONNECT_CANCEL)
    if own is not None:
        request.timeout.FromMilliseconds(int(own * 1000))
    assert requests.generate(request, left).timeout == limit


async def test_progress_says_when_the_end_is_expected(pool: Pool) -> None:
    view = await load(pool)
    *steps, _, _ = await generate(pool, view.name, steps=4)
    first, *others = [step.expected_end_time for step in steps]
    assert first is None
    assert all(abs(end - time.time()) < 5 for end in others)

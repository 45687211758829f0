"""What every executor promises, checked against each of them: the fake that other tests rely on included."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import psutil
import pytest
from denoised.errors import InternalError, NotAPipelineError, WorkerLostError
from denoised_server.executor import Executor
from denoised_server.executor.local import LocalExecutor
from denoised_server.messages import (
    Command,
    Event,
    Finished,
    Generate,
    Load,
    Loaded,
    LoadProgress,
    Output,
    Progress,
    Recipe,
    Snapshot,
    Spec,
    Unload,
    Unloaded,
    Watch,
    WorkerSettings,
)

from tests.unit.fake_executor import FakeExecutor

LOAD = Load("pipelines/a", Recipe(Spec("weights")))


def local(*devices: str, start_timeout: float = 60) -> LocalExecutor:
    settings = [WorkerSettings(device, 1, 0.9, (), "", 32, False) for device in devices]
    return LocalExecutor(settings, start_timeout=start_timeout, worker="tests.contract.toy_worker:ToyWorker")


@pytest.fixture(params=["local", "fake"])
async def executor(request: pytest.FixtureRequest) -> AsyncIterator[Executor]:
    executor = local("one", "two") if request.param == "local" else FakeExecutor(2)
    assert await executor.start() == ["workers/0", "workers/1"]
    yield executor
    await executor.stop()


@pytest.fixture
async def processes() -> AsyncIterator[LocalExecutor]:
    """The local executor alone, for what only processes can do."""
    executor = local("one", "two")
    await executor.start()
    yield executor
    await executor.stop()


async def run(executor: Executor, command: Command, worker: str = "workers/0") -> list[Event]:
    return [event async for event in executor.submit(worker, command)]


def generate(prompt: str, steps: int = 3) -> Generate:
    return Generate("pipelines/a", {"prompt": prompt, "num_inference_steps": steps}, seeds=(7,))


async def test_it_says_what_its_workers_are(executor: Executor) -> None:
    assert executor.info("workers/1").embedded_models == ("demo",)


async def test_events_come_in_order_and_the_command_ends(executor: Executor) -> None:
    load = await run(executor, LOAD)
    assert [type(event) for event in load[-2:]] == [LoadProgress, Loaded]
    events = await run(executor, generate("a cat"))
    assert events[:3] == [Progress(1, 3), Progress(2, 3), Progress(3, 3)]
    assert isinstance(events[3], Output)
    assert (events[3].artifact.data, events[3].seed) == (b"a cat", 7)
    assert isinstance(events[4], Finished)
    assert len(events) == 5


async def test_commands_run_beside_each_other(executor: Executor) -> None:
    await run(executor, LOAD)
    async with aclosing(executor.submit("workers/0", generate("hang"))) as hanging:
        await anext(hanging)
        assert len(await run(executor, generate("a cat"))) == 5
        await anext(hanging)


async def test_it_raises_what_the_command_raised_with_all_it_says(executor: Executor) -> None:
    with pytest.raises(NotAPipelineError) as caught:
        await run(executor, Load("pipelines/b", Recipe(Spec("absent"))))
    assert caught.value.hint.lower().startswith("look elsewhere")


async def test_what_is_no_error_of_ours_comes_as_an_internal_error_without_details(executor: Executor) -> None:
    await run(executor, LOAD)
    with pytest.raises(InternalError) as caught:
        await run(executor, generate("bug"))
    assert "secret" not in str(caught.value)
    assert len(await run(executor, generate("a cat"))) == 5


async def test_closing_cancels(executor: Executor) -> None:
    await run(executor, LOAD)
    event: Any
    async with aclosing(executor.submit("workers/0", generate("hang"))) as events:
        async for event in events:
            if event.completed_steps == 3:
                break
    assert await run(executor, Unload("pipelines/a")) == [Unloaded(1000)]


async def test_a_watch_goes_on_until_it_is_closed(executor: Executor) -> None:
    reports: Any
    async with aclosing(executor.submit("workers/0", Watch(0.01))) as reports:
        first = await anext(reports)
        assert isinstance(first, Snapshot)
        assert first.components == ()
        await run(executor, LOAD)
        while (report := await anext(reports)).components == ():
            pass
        assert report.components[0].pipelines == ("pipelines/a",)


async def test_a_death_fails_what_ran_there_and_nothing_elsewhere(executor: Executor) -> None:
    await run(executor, LOAD)
    await run(executor, LOAD, "workers/1")
    async with aclosing(executor.submit("workers/0", generate("hang"))) as lost:
        await anext(lost)
        async with aclosing(executor.submit("workers/1", generate("hang"))) as unharmed:
            await anext(unharmed)
            with pytest.raises(WorkerLostError):
                await run(executor, generate("die"))
            with pytest.raises(WorkerLostError) as caught:
                async for _ in lost:
                    pass
            assert caught.value.retry_after
            for _ in range(50):
                await anext(unharmed)


async def test_a_death_is_told_and_the_dead_take_no_commands(executor: Executor) -> None:
    deaths = executor.deaths()
    with pytest.raises(WorkerLostError):
        await run(executor, Load("pipelines/a", Recipe(Spec("die"))))
    assert await anext(deaths) == "workers/0"
    with pytest.raises(WorkerLostError):
        await run(executor, LOAD)


async def test_a_worker_that_was_restarted_starts_from_nothing(executor: Executor) -> None:
    await run(executor, LOAD)
    with pytest.raises(WorkerLostError):
        await run(executor, generate("die"))
    await anext(executor.deaths())
    await executor.restart("workers/0")
    assert isinstance((await run(executor, LOAD))[-1], Loaded)


async def test_stopping_ends_what_runs_and_the_news_of_deaths(executor: Executor) -> None:
    await run(executor, LOAD)
    events = executor.submit("workers/0", generate("hang"))
    await anext(events)
    await executor.stop()
    with pytest.raises(WorkerLostError):
        async for _ in events:
            pass
    assert [name async for name in executor.deaths()] == []


async def test_a_process_that_is_killed_is_noticed_at_once(processes: LocalExecutor) -> None:
    await run(processes, LOAD)
    async with aclosing(processes.submit("workers/0", generate("hang"))) as events:
        await anext(events)
        os.kill(processes.info("workers/0").pid, signal.SIGKILL)
        async with asyncio.timeout(2):
            with pytest.raises(WorkerLostError, match="by signal 9"):
                async for _ in events:
                    pass
            assert await anext(processes.deaths()) == "workers/0"


async def test_a_process_that_has_stopped_does_not_stop_the_event_loop(processes: LocalExecutor) -> None:
    pid = processes.info("workers/0").pid
    os.kill(pid, signal.SIGSTOP)
    try:
        # More than any pipe holds.
        large = generate("x" * 1_000_000)
        async with asyncio.timeout(5):
            for _ in range(4):
                events = processes.submit("workers/0", large)
                waiting = asyncio.create_task(anext(events))
                await asyncio.sleep(0)
                waiting.cancel()
                await asyncio.wait([waiting])
                await events.aclose()
            assert isinstance((await run(processes, LOAD, "workers/1"))[-1], Loaded)
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_a_terminal_interrupt_leaves_the_workers_to_the_front_end(processes: LocalExecutor) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(processes.info("workers/0").pid, number)
    assert isinstance((await run(processes, LOAD))[-1], Loaded)


async def test_a_worker_that_cannot_start_is_an_error_and_leaves_no_process() -> None:
    executor = local("one", "broken")
    with pytest.raises(WorkerLostError, match="workers/1 ended with exit code 1"):
        await executor.start()
    assert multiprocessing.active_children() == []


async def test_a_worker_that_takes_too_long_to_start_is_an_error() -> None:
    executor = local("slow to start", start_timeout=0.01)
    with pytest.raises(WorkerLostError, match="start_timeout"):
        await executor.start()


async def test_a_process_that_is_dying_may_be_killed_at_any_moment(processes: LocalExecutor) -> None:
    for _ in range(5):
        processes.kill("workers/0")
        death = asyncio.ensure_future(anext(aiter(processes.deaths())))
        while not death.done():
            processes.kill("workers/0")
            await asyncio.sleep(0)
        processes.kill("workers/0")
        await processes.restart("workers/0")


async def test_restarts_leave_no_file_open(processes: LocalExecutor) -> None:
    deaths = aiter(processes.deaths())

    async def restart() -> int:
        processes.kill("workers/0")
        await anext(deaths)
        await processes.restart("workers/0")
        return psutil.Process().num_fds()

    gc.disable()
    try:
        before = await restart()
        assert [await restart() for _ in range(3)] == [before] * 3
    finally:
        gc.enable()

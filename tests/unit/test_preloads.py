"""Preloads: how they are written, and that the daemon is not ready before they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest
from denoised.errors import NotAPipelineError
from denoised_server import callers, preloads, readiness
from denoised_server.callers import Caller, Scope
from denoised_server.journal import Journal
from denoised_server.messages import Generate, Load, Parameter, Progress, Spec
from denoised_server.pool import Lease, Pool
from denoised_server.preloads import Preload, parse, to_text
from denoised_server.probes import Health

from tests.unit.fake_executor import FakeExecutor

PAINTER = Preload("pipelines/painter", Spec("weights"))


@pytest.mark.parametrize(
    ("given", "preload"),
    [
        ("weights,id=painter", PAINTER),
        ("demo", Preload("pipelines/demo", Spec("demo"))),
        ("stabilityai/SDXL_Base-1.0", Preload("pipelines/sdxl-base-1-0", Spec("stabilityai/SDXL_Base-1.0"))),
        ("/models/7b", Preload("pipelines/p-7b", Spec("/models/7b"))),
        (
            "a/b, id=c, task=inpainting, dtype=fp16, revision=main, variant=fp16",
            Preload("pipelines/c", Spec("a/b", "main", "fp16", "inpainting", "float16")),
        ),
        ({"repo": "a/b", "id": "c", "dtype": "auto"}, Preload("pipelines/c", Spec("a/b", dtype="auto"))),
    ],
)
def test_these_are_understood(given: object, preload: Preload) -> None:
    assert parse(to_text(given)) == preload


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("", "no repository"),
        ("a/b,id", "none of"),
        ("a/b,name=c", "none of"),
        ("a/b,id=c,id=d", "none of"),
        ("a/b,id=C", "no id"),
        ("a/b,task=text-to-imag", "Did you mean 'text-to-image'"),
        ("a/b,dtype=int4", "no element type"),
        ({"id": "a"}, "no repository"),
        (7, "no preload"),
    ],
)
def test_these_are_not(given: object, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        to_text(given)


def test_a_trial_asks_for_little_and_for_nothing_that_the_pipeline_does_not_take() -> None:
    taken = ("prompt", "image", "num_inference_steps", "guidance_scale")
    arguments = preloads.trial("pipelines/a", [Parameter(name) for name in taken]).arguments
    assert set(arguments) == {"prompt", "image", "num_inference_steps"}
    assert arguments["num_inference_steps"] == 2


@pytest.fixture
def executor() -> FakeExecutor:
    return FakeExecutor()


@pytest.fixture
async def make(executor: FakeExecutor, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Pool]]:
    monkeypatch.setattr(readiness, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(readiness, "TRIAL_SECONDS", 0.005)
    pools = []

    def make(*preload: Preload, other: FakeExecutor | None = None, **settings: Any) -> Pool:
        pools.append(Pool(other or executor, preload=preload, **settings))
        return pools[-1]

    yield make
    for pool in pools:
        await pool.stop()


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110 - what is waited for is another's state
            await asyncio.sleep(0.001)


async def test_the_daemon_is_ready_when_its_pipelines_are(make: Callable[..., Pool]) -> None:
    pool = make(PAINTER)
    await pool.start()
    assert (pool.health().health, pool.has_started) == (Health.STARTING, False)
    await pool.get_ready()
    assert (pool.health().health, pool.has_started) == (Health.READY, True)
    view = pool.get(PAINTER.name)
    assert (view.pinned, view.shared, view.worker) == (True, True, "workers/0")


async def test_what_cannot_be_loaded_ends_the_start(make: Callable[..., Pool]) -> None:
    pool = make(PAINTER, Preload("pipelines/none", Spec("absent")))
    await pool.start()
    with pytest.raises(NotAPipelineError):
        await pool.get_ready()


async def test_a_worker_that_dies_meanwhile_does_not_end_it(make: Callable[..., Pool], executor: FakeExecutor) -> None:
    pool = make(Preload("pipelines/a", Spec("die")))
    await pool.start()
    task = asyncio.create_task(pool.get_ready())
    await until(lambda: len(executor.sent(Load)) > 2)
    assert not task.done()
    assert pool.health().health is not Health.READY
    task.cancel()


async def test_a_pipeline_that_was_lost_is_brought_back_and_so_is_one_that_was_unloaded(
    make: Callable[..., Pool], executor: FakeExecutor
) -> None:
    pool = make(PAINTER)
    await pool.start()
    await pool.get_ready()
    executor.hold(Load)
    executor.kill("workers/0")
    await until(lambda: pool.health().health is Health.STARTING)
    executor.release()
    await until(lambda: pool.health().health is Health.READY)
    executor.hold(Load)
    await pool.unload(PAINTER.name)
    assert pool.health().health is Health.STARTING
    executor.release()
    await until(lambda: pool.health().health is Health.READY)
    assert pool.get(PAINTER.name).pinned


async def test_the_configuration_goes_before_the_journal(make: Callable[..., Pool]) -> None:
    journal = Journal()
    first = make(PAINTER, Preload("pipelines/old", Spec("old")), journal=journal)
    await first.start()
    await first.get_ready()
    async for _ in first.load(Spec("others"), Lease(pipeline_id="sculptor")):
        pass
    kept = dict(await journal.pipelines())
    await first.stop()

    journal = Journal()
    for name, fields in kept.items():
        await journal.keep_pipeline(name, dict(fields))
    other = Spec("other weights")
    declared = Preload(PAINTER.name, other), Preload("pipelines/sculptor", Spec("others"))
    second = make(*declared, other=FakeExecutor(), journal=journal)
    await second.start()
    await second.get_ready()
    assert second.get(PAINTER.name).recipe.spec == other
    assert second.get("pipelines/sculptor").pinned
    assert not second.get("pipelines/old").pinned


async def test_a_clients_own_pipeline_of_that_name_stays_nobody_elses(make: Callable[..., Pool]) -> None:
    pool = make(PAINTER)
    await pool.start()

    async def load() -> None:
        callers.act_for(Caller("alice", frozenset({Scope.LOAD})))
        async for _ in pool.load(PAINTER.spec, Lease(pipeline_id="painter")):
            pass
        assert pool.get(PAINTER.name).owner == "alice"

    await asyncio.create_task(load())
    await pool.get_ready()
    view = pool.get(PAINTER.name)
    assert (view.owner, view.pinned, view.shared, view.worker) == ("", True, True, "workers/0")


async def test_readiness_generates_where_it_is_asked_to(
    make: Callable[..., Pool], executor: FakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make(PAINTER, trials=True)
    await pool.start()
    await pool.get_ready()
    assert executor.sent(Generate)
    monkeypatch.setitem(preloads.TRIAL, "prompt", "bug")
    await until(lambda: pool.health().health is Health.FAILING)
    assert "INTERNAL" in pool.health().reasons[0]
    monkeypatch.undo()
    await until(lambda: pool.health().health is Health.READY)


async def test_no_trial_disturbs_a_worker_that_has_work(make: Callable[..., Pool], executor: FakeExecutor) -> None:
    pool = make(PAINTER, trials=True)
    await pool.start()
    await pool.get_ready()
    async with aclosing(pool.generate(Generate(PAINTER.name, {"prompt": "hang"}))) as events:
        async for entry in events:
            if isinstance(entry.event, Progress):
                break
        sent = len(executor.sent(Generate))
        # Twenty times as long as it is between two trials. One was perhaps on its way.
        await asyncio.sleep(0.1)
        assert len(executor.sent(Generate)) <= sent + 1
        assert pool.health().health is Health.READY

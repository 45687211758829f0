"""Quotas as a table, and through the door."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from denoised.errors import DenoisedError, QuotaExceededError
from denoised.v1 import pipeline_service_pb2 as pipeline_pb
from denoised_server import quotas, tokens
from denoised_server.access import Access
from denoised_server.callers import Caller, Quota, Scope
from denoised_server.messages import Parameter
from denoised_server.quotas import Quotas
from denoised_server.tokens import Token
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.fake_executor import WEIGHT_BYTES
from tests.unit.test_ownership import HERS, As, refused
from tests.unit.test_services import Daemon, serving


def client(name: str = "alice", **limits: int) -> Caller:
    return Caller(name, quota=Quota(**limits))


def test_a_minutes_requests_may_come_at_once_and_then_at_their_rate() -> None:
    held, alice = Quotas(), client(requests_per_minute=6)
    for _ in range(6):
        held.count_request(alice, 100)
    with pytest.raises(QuotaExceededError) as refused:
        held.count_request(alice, 100)
    assert refused.value.retry_after == pytest.approx(10)
    assert refused.value.metadata == {"quota": "requests_per_minute"}
    held.count_request(client("bob", requests_per_minute=6), 100)
    held.count_request(alice, 110)
    with pytest.raises(QuotaExceededError):
        held.count_request(alice, 110)


@given(st.lists(st.floats(0, 30), max_size=60), st.integers(1, 20))
def test_no_minute_has_more_than_twice_a_minutes_requests(pauses: list[float], limit: int) -> None:
    held, alice, now, admitted = Quotas(), client(requests_per_minute=limit), 0.0, []
    for pause in pauses:
        now += pause
        with contextlib.suppress(QuotaExceededError):
            held.count_request(alice, now)
            admitted.append(now)
    for end in admitted:
        assert sum(end - 60 < moment <= end for moment in admitted) <= 2 * limit


def test_no_limit_is_no_limit_and_zero_is_nothing() -> None:
    held = Quotas()
    for _ in range(1000):
        held.count_request(client(), 0)
        held.enter(client())
    with pytest.raises(QuotaExceededError) as refused:
        held.count_request(client("bob", requests_per_minute=0), 0)
    assert refused.value.retry_after == 60


def test_who_waits_is_counted_until_it_waits_no_longer() -> None:
    held, alice = Quotas(), client(waiting=2)
    held.enter(alice)
    held.enter(alice)
    with pytest.raises(QuotaExceededError):
        held.enter(alice)
    held.leave(alice)
    held.enter(alice)


STEPS = Parameter("num_inference_steps", default=30, has_default=True)
IMAGES = Parameter("num_images_per_prompt", default=1, has_default=True)


@pytest.mark.parametrize(
    ("arguments", "work"),
    [
        ({"height": 64, "width": 32, "num_inference_steps": 2}, 64 * 32 * 2),
        ({"height": 64, "width": 32}, 64 * 32 * 30),
        ({"height": 64, "width": 64, "num_inference_steps": 1, "num_images_per_prompt": 3}, 64 * 64 * 3),
        ({"height": 64, "width": 64, "num_inference_steps": 1, "prompt": ["a", "b"]}, 64 * 64 * 2),
        ({"num_inference_steps": 1}, 1024 * 1024),
        ({"height": 8.5, "width": 10, "num_inference_steps": 1}, 90),
        ({"height": None, "width": None, "num_inference_steps": 1}, 1024 * 1024),
    ],
)
def test_the_work_of_a_request_is_counted_and_what_is_not_said_is_assumed(arguments: Any, work: int) -> None:
    quotas.check_work(client(pixel_steps=work), arguments, [STEPS, IMAGES])
    with pytest.raises(QuotaExceededError):
        quotas.check_work(client(pixel_steps=work - 1), arguments, [STEPS, IMAGES])


# Through the door.


@asynccontextmanager
async def alice_with(**limits: int) -> AsyncIterator[tuple[Daemon, As]]:
    known = [
        Token("alice", frozenset(Scope) - {Scope.ADMIN}, tokens.digest("secret of alice"), quota=Quota(**limits)),
        Token("bob", frozenset(Scope) - {Scope.ADMIN}, tokens.digest("secret of bob")),
    ]
    async with serving(Access(lambda: known), max_running=2) as daemon:
        caller = As("alice", daemon.port)
        async with caller.channel:
            yield daemon, caller


def exceeded(error: DenoisedError) -> tuple[str, bool]:
    """Which quota, and whether waiting helps."""
    assert type(error) is QuotaExceededError
    return error.metadata["quota"], error.retry_after is not None


async def until(call: Any, kind: str) -> None:
    """Reads up to an event of this kind."""
    async with asyncio.timeout(10):
        while not (await call.read()).HasField(kind):
            pass


async def test_requests_in_a_minute_are_bounded_and_looking_is_free() -> None:
    async with alice_with(requests_per_minute=2) as (_, alice):
        await alice.load(pipeline_id="hers")
        for _ in range(10):
            await alice.pipelines.GetPipeline(pipeline_pb.GetPipelineRequest(name=HERS))
        assert len([event async for event in alice.generate(HERS)]) > 1
        assert exceeded(await refused(alice.generate(HERS))) == ("requests_per_minute", True)


async def test_pipelines_are_bounded_and_joining_ones_own_takes_none() -> None:
    async with alice_with(pipelines=1) as (_, alice):
        await alice.load(pipeline_id="hers")
        await alice.load(pipeline_id="hers")
        request = pipeline_pb.LoadPipelineRequest(spec=pipeline_pb.PipelineSpec(repo_id="weights"))
        assert exceeded(await refused(alice.pipelines.LoadPipeline(request))) == ("pipelines", False)
        await alice.pipelines.UnloadPipeline(pipeline_pb.UnloadPipelineRequest(name=HERS))
        await alice.load()


async def test_weights_of_ones_own_are_bounded_and_a_load_too_many_leaves_nothing() -> None:
    async with alice_with(exclusive_bytes=WEIGHT_BYTES) as (daemon, alice):
        await alice.load(pipeline_id="hers")
        await alice.load(pipeline_id="twin")
        more = pipeline_pb.LoadPipelineRequest(spec=pipeline_pb.PipelineSpec(repo_id="others"))
        assert exceeded(await refused(alice.pipelines.LoadPipeline(more))) == ("exclusive_bytes", False)
        await daemon.pool.until(lambda: len(daemon.pool.list_pipelines(page_size=0, page_token="")[0]) == 2)
        # Shared with another client's pipeline, the same weights are nobody's own.
        bob = As("bob", daemon.port)
        async with bob.channel:
            shared = bob.pipelines.LoadPipeline(more)
            assert [response async for response in shared][-1].HasField("pipeline")
        joined = alice.pipelines.LoadPipeline(more)
        assert [response async for response in joined][-1].HasField("pipeline")


async def test_one_request_is_bounded_by_its_pixels_times_steps() -> None:
    async with alice_with(pixel_steps=64 * 64 * 10) as (_, alice):
        await alice.load(pipeline_id="hers")
        small: dict[str, Any] = {"sampling": {"height": 64, "width": 64, "num_inference_steps": 10}}
        assert len([event async for event in alice.generate(HERS, **small)]) > 1
        large: dict[str, Any] = {"sampling": {"height": 64, "width": 64, "num_inference_steps": 11}}
        assert exceeded(await refused(alice.generate(HERS, **large))) == ("pixel_steps", False)


async def test_priority_is_bounded() -> None:
    async with alice_with(priority=5) as (_, alice):
        await alice.load(pipeline_id="hers")
        assert len([event async for event in alice.generate(HERS, priority=5)]) > 1
        assert exceeded(await refused(alice.generate(HERS, priority=6))) == ("priority", False)


async def test_generations_that_run_and_that_wait_are_bounded() -> None:
    async with alice_with(running=1, waiting=1) as (daemon, alice):
        await alice.load(pipeline_id="hers")
        first = alice.generate(HERS, prompt="hang")
        await until(first, "progress")
        second = alice.generate(HERS, prompt="hang")
        await until(second, "queued")
        assert exceeded(await refused(alice.generate(HERS))) == ("waiting", True)
        # The daemon has places left, and they are others'.
        bob = As("bob", daemon.port)
        async with bob.channel:
            await bob.load(pipeline_id="his")
            async with asyncio.timeout(5):
                assert [event async for event in bob.generate("pipelines/his")][-1].HasField("summary")
        first.cancel()
        await until(second, "progress")
        second.cancel()
        assert ("Generate", "quota_exceeded") in daemon.outcomes

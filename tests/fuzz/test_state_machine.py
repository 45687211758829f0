"""Clients who load, derive, update, generate, cancel, unload and expire in any order; workers die and are drained.

A small model says what must hold: which pipelines there are and whose, that nobody sees more than that, that what is
there works, as it was set last, and that a worker holds nothing that nobody has.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
from denoised.errors import (
    DenoisedError,
    GenerationNotFoundError,
    NotOwnerError,
    PipelineExistsError,
    PipelineNotFoundError,
)
from denoised_server import callers
from denoised_server.callers import Caller, Scope
from denoised_server.generation import Started, Summary
from denoised_server.messages import Derivation, Generate, NoiseScheduler, PipelineSettings, Recipe, Spec
from denoised_server.pool import Lease, Pool
from denoised_server.supervision import WorkerState
from denoised_server.updates import Change
from denoised_server.views import PipelineView
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from tests.fuzz import IS_LONG
from tests.unit.fake_executor import FakeExecutor

T = TypeVar("T")

USUAL = frozenset(Scope) - {Scope.ADMIN}
CLIENTS = {name: Caller(name, USUAL) for name in ("alice", "bob")}
ROOT = Caller("root", frozenset({Scope.ADMIN}))
SHORT, LONG = 100.0, 100_000.0
clients = st.sampled_from(sorted(CLIENTS))
WEIGHTS = st.sampled_from(["one", "two"])
TTLS = st.sampled_from([SHORT, LONG])
SCHEDULERS = st.sampled_from([None, NoiseScheduler("EulerDiscreteScheduler"), NoiseScheduler("DDIMScheduler")])
DEFAULTS = PipelineSettings()
IDS = st.sampled_from(["", "", "chosen", "other"])


@dataclass
class Held:
    """What the model knows of a pipeline."""

    owner: str
    shared: bool
    ttl: float
    weights: str
    recipe: Recipe
    settings: PipelineSettings = DEFAULTS


class Stream:
    """A generation that goes on until it is left."""

    def __init__(self, client: str, name: str, events: Any) -> None:
        self.client, self.name, self.generation, self._events = client, name, "", events
        self.task: asyncio.Task[None] = asyncio.get_running_loop().create_task(self._read())
        self.began = asyncio.Event()

    async def _read(self) -> None:
        # What a worker that dies ends, ends with an error, or goes on with another worker.
        with contextlib.suppress(DenoisedError):
            async for entry in self._events:
                if isinstance(entry.event, Started):
                    self.generation = entry.event.name
                self.began.set()
        self.began.set()

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])
        await self._events.aclose()


class Clients(RuleBasedStateMachine):
    names: Bundle[str] = Bundle("names")
    streams: Bundle[Stream] = Bundle("streams")

    @initialize()
    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.executor = FakeExecutor(workers=2)
        self.held: dict[str, Held] = {}
        self.open: list[Stream] = []
        self.died: list[str] = []
        self.drained = ""
        self.pool = self.run(ROOT, self._start)

    async def _start(self) -> Pool:
        pool = Pool(self.executor, max_ttl=LONG)
        await pool.start()
        return pool

    def run(self, caller: Caller, work: Callable[[], Awaitable[T]]) -> T:
        async def act() -> T:
            callers.act_for(caller)
            async with asyncio.timeout(20):
                return await work()

        return self.loop.run_until_complete(act())

    def sees(self, client: str, name: str) -> bool:
        held = self.held.get(name)
        return held is not None and (held.shared or held.owner == client)

    @rule(target=names, client=clients, weights=WEIGHTS, shared=st.booleans(), ttl=TTLS, pid=IDS)
    def load(self, client: str, weights: str, shared: bool, ttl: float, pid: str) -> Any:
        recipe, lease = Recipe(Spec(weights)), Lease(ttl=ttl, pipeline_id=pid, shared=shared)

        async def work() -> PipelineView:
            events = [event async for event in self.pool.load(recipe.spec, lease)]
            assert isinstance(events[-1], PipelineView)
            return events[-1]

        known = self.held.get(f"pipelines/{pid}")
        if known is not None and not (self.sees(client, f"pipelines/{pid}") and known.recipe == recipe):
            with pytest.raises(PipelineExistsError):
                self.run(CLIENTS[client], work)
            return multiple()
        view = self.run(CLIENTS[client], work)
        self.held.setdefault(view.name, Held(client, shared, ttl, weights, recipe))
        return view.name

    @rule(target=names, client=clients, source=names, shared=st.booleans())
    def derive(self, client: str, source: str, shared: bool) -> Any:
        derivation = Derivation("inpainting")

        async def work() -> PipelineView:
            return await self.pool.derive(source, derivation, Lease(ttl=LONG, shared=shared))

        if not self.sees(client, source):
            with pytest.raises(PipelineNotFoundError):
                self.run(CLIENTS[client], work)
            return multiple()
        view = self.run(CLIENTS[client], work)
        assert view.source == source
        origin = self.held[source]
        self.held[view.name] = Held(client, shared, LONG, origin.weights, view.recipe, view.recipe.settings)
        return view.name

    @rule(client=clients, name=names, scheduler=SCHEDULERS)
    def update(self, client: str, name: str, scheduler: NoiseScheduler | None) -> None:
        change = Change(frozenset({"noise_scheduler"}), PipelineSettings(scheduler))
        if self.change(client, name, lambda: self.pool.update(name, change)):
            self.held[name].settings = PipelineSettings(scheduler)

    @rule(client=clients, name=names)
    def renew(self, client: str, name: str) -> None:
        if self.change(client, name, lambda: self.pool.renew(name, LONG)):
            self.held[name].ttl = LONG

    def change(self, client: str, name: str, work: Callable[[], Awaitable[object]]) -> bool:
        """Whether the client could: only the owner can, and others are told no more than they know already."""
        if not self.sees(client, name):
            with pytest.raises(PipelineNotFoundError):
                self.run(CLIENTS[client], work)
        elif self.held[name].owner != client:
            with pytest.raises(NotOwnerError):
                self.run(CLIENTS[client], work)
        else:
            self.run(CLIENTS[client], work)
            return True
        return False

    @rule(client=clients, name=names)
    def generate(self, client: str, name: str) -> None:
        async def work() -> list[Any]:
            command = Generate(name, {"prompt": "a cat", "num_inference_steps": 2}, seeds=(1,))
            return [event async for event in self.pool.generate(command)]

        if not self.sees(client, name):
            with pytest.raises(PipelineNotFoundError):
                self.run(CLIENTS[client], work)
        else:
            events = self.run(CLIENTS[client], work)
            assert isinstance(events[-1].event, Summary)

    @rule(target=streams, client=clients, name=names)
    def begin(self, client: str, name: str) -> Any:
        if not self.sees(client, name):
            return multiple()

        async def work() -> Stream:
            stream = Stream(client, name, self.pool.generate(Generate(name, {"prompt": "hang"}, seeds=(1,))))
            await stream.began.wait()
            return stream

        stream = self.run(CLIENTS[client], work)
        if not stream.generation:
            # Refused: two workers have died under such a request.
            return multiple()
        self.open.append(stream)
        return stream

    @rule(stream=consumes(streams))
    def cancel(self, stream: Stream) -> None:
        self.run(ROOT, stream.leave)
        self.open.remove(stream)

    @rule(client=clients, stream=streams)
    def cancel_by_name(self, client: str, stream: Stream) -> None:
        async def work() -> None:
            self.pool.cancel_generation(stream.generation)
            await asyncio.wait([stream.task])

        if stream.client == client and not stream.task.done():
            self.run(CLIENTS[client], work)
        else:
            with pytest.raises(GenerationNotFoundError):
                self.run(CLIENTS[client], work)

    @rule(client=clients, name=names)
    def unload(self, client: str, name: str) -> None:
        if name in self.held and self.change(client, name, lambda: self.pool.unload(name, force=True)):
            del self.held[name]

    @rule()
    def expire(self) -> None:
        """What has a short lease and is not used goes, and nothing else."""
        used = {stream.name for stream in self.open if not stream.task.done()}
        due = [name for name, held in self.held.items() if held.ttl == SHORT and name not in used]

        async def work() -> None:
            self.pool.expire(time.time() + SHORT + 1)
            await self.pool.until(lambda: not set(due) & {view.name for view in self.views()})

        self.run(ROOT, work)
        for name in due:
            del self.held[name]

    # Once each: a worker that dies again and again is given time before it is started again.
    @precondition(lambda self: len(self.died) < 2)
    @rule()
    def crash(self) -> None:
        worker = f"workers/{len(self.died)}"
        self.died.append(worker)

        async def work() -> None:
            self.executor.kill(worker)
            await self.pool.until(lambda: self.is_back(worker))

        self.run(ROOT, work)

    @precondition(lambda self: not self.drained)
    @rule(worker=st.sampled_from(["workers/0", "workers/1"]))
    def drain(self, worker: str) -> None:
        """It goes on while what runs there runs."""
        self.drained = worker

        async def work() -> None:
            drain = asyncio.ensure_future(self.pool.drain_worker(worker))
            await self.settled()
            drain.cancel()

        self.run(ROOT, work)

    @precondition(lambda self: self.drained)
    @rule()
    def resume(self) -> None:
        async def work() -> None:
            self.pool.resume_worker(self.drained)

        self.run(ROOT, work)
        self.drained = ""

    def is_back(self, name: str) -> bool:
        workers, _ = self.pool.list_workers(page_size=0, page_token="")
        return any(
            worker.name == name and worker.restart_count and worker.state in (WorkerState.ACTIVE, WorkerState.DRAINING)
            for worker in workers
        )

    def views(self) -> list[PipelineView]:
        return self.pool.list_pipelines(page_size=500, page_token="")[0]

    async def settled(self) -> None:
        """Ends of generations are noticed a turn or two of the loop later."""
        for _ in range(50):
            await asyncio.sleep(0)

    @invariant()
    def everybody_sees_what_is_theirs_and_what_is_shared(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.run(ROOT, self.settled)

        async def listed() -> set[str]:
            return {view.name for view in self.views()}

        for client, caller in CLIENTS.items():
            assert self.run(caller, listed) == {name for name in self.held if self.sees(client, name)}
        assert self.run(ROOT, listed) == set(self.held)

    @invariant()
    def workers_hold_nothing_that_nobody_has(self) -> None:
        if not hasattr(self, "pool"):
            return

        async def homes() -> dict[str, str]:
            return {view.name: view.worker for view in self.views()}

        where = self.run(ROOT, homes)
        # A worker that is drained holds what it has until what was begun there has ended.
        running = {stream.name for stream in self.open if not stream.task.done()}
        for place in self.executor.workers.values():
            assert set(place.pipelines) <= set(self.held)
            assert all(self.held[name].weights == weights for name, weights in place.pipelines.items())
            if place.name != self.drained:
                assert all(where[name] == place.name or name in running for name in place.pipelines)

    @invariant()
    def pipelines_are_as_they_were_set(self) -> None:
        if hasattr(self, "pool"):

            async def settings() -> dict[str, PipelineSettings]:
                return {view.name: view.recipe.settings for view in self.views()}

            assert self.run(ROOT, settings) == {name: held.settings for name, held in self.held.items()}

    @invariant()
    def what_runs_is_what_was_begun(self) -> None:
        if hasattr(self, "pool"):

            async def counts() -> dict[str, int]:
                return {view.name: view.generation_count for view in self.views()}

            running = [stream.name for stream in self.open if not stream.task.done()]
            assert {name: count for name, count in self.run(ROOT, counts).items() if count} == {
                name: running.count(name) for name in running
            }

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return

        async def end() -> None:
            for stream in self.open:
                await stream.leave()
            for name in self.held:
                await self.pool.unload(name, force=True)
            assert all(not place.pipelines for place in self.executor.workers.values())
            await self.pool.stop()

        try:
            self.run(ROOT, end)
        finally:
            self.loop.close()


TestClients = Clients.TestCase
TestClients.settings = settings(
    max_examples=2000 if IS_LONG else 60,
    stateful_step_count=50 if IS_LONG else 30,
    deadline=None,
    derandomize=not IS_LONG,
    database=None,
)

"""Drains: workers that take no more work, and their pipelines on the way to others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial

from denoised.errors import DenoisedError

from .background import Background
from .builds import answer
from .condition import Condition
from .executor import Executor
from .handles import Handle, State
from .messages import Unload, Unloaded

logger = logging.getLogger(__name__)


class Drains:
    """Takes pipelines off a worker: at once for work that comes, and out of its memory when what runs has ended.

    `is_busy` says whether a worker has something to finish, or something of one pipeline's; `is_building` whether a
    pipeline is on its way to some worker; and `moved` hears of a worker whose pipelines are to be built elsewhere.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        handles: Iterable[Handle],
        is_busy: Callable[[str, Handle | None], bool],
        is_building: Callable[[Handle], bool],
        moved: Callable[[str], None],
        changes: Condition,
    ) -> None:
        self._executor = executor
        self._handles = handles
        self._is_busy = is_busy
        self._is_building = is_building
        self._moved = moved
        self._changes = changes
        self._background = Background()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._left: dict[str, set[Handle]] = {}

    async def drain(self, worker: str) -> None:
        """Returns when the worker has nothing to do and holds nothing, or takes work again. Leaving early is no end."""
        task = self._running.get(worker)
        if task is None:
            task = self._running[worker] = self._background.spawn(self._drain(worker), name=f"drain of {worker}")
            task.add_done_callback(partial(self._over, worker))
        await asyncio.wait([task])

    def end(self, worker: str) -> None:
        """The worker takes work again: what it still holds and nobody builds elsewhere is its again."""
        if (task := self._running.pop(worker, None)) is None:
            return
        task.cancel()
        for handle in self._left.pop(worker, set()):
            if not (handle.worker or self._is_building(handle)) and handle.state is State.ACTIVE:
                handle.worker = worker
            else:
                self._let_go_soon(worker, handle)

    def claim(self, handle: Handle) -> str:
        """A worker that has still to let go of the pipeline, which is the caller's to see to now; empty for none."""
        for worker, left in self._left.items():
            if handle in left:
                left.remove(handle)
                return worker
        return ""

    def lose(self, worker: str) -> None:
        """The worker died, and holds nothing."""
        if worker in self._left:
            self._left[worker].clear()

    async def stop(self) -> None:
        await self._background.stop()

    async def _drain(self, worker: str) -> None:
        left = self._left[worker] = set()
        while True:
            # Again and again: a load that was under way may have ended on it.
            # What is being unloaded there stays, with those that still wait to use it.
            if held := {one for one in self._handles if one.worker == worker and one.state is State.ACTIVE}:
                left |= held
                for handle in held:
                    handle.worker = ""
                self._moved(worker)
            if not (self._is_busy(worker, None) or self._is_on(worker)):
                break
            await self._changes.until(
                lambda: self._is_on(worker, State.ACTIVE) or not (self._is_busy(worker, None) or self._is_on(worker))
            )
        while left:
            # Shielded: where the drain is ended meanwhile, what has begun to leave leaves, and the rest stays.
            await asyncio.shield(self._let_go_soon(worker, left.pop()))
        del self._left[worker]
        logger.info("%s is drained", worker)

    def _over(self, worker: str, task: asyncio.Task[None]) -> None:
        if self._running.get(worker) is task:
            del self._running[worker]

    def _let_go_soon(self, worker: str, handle: Handle) -> asyncio.Task[None]:
        return self._background.spawn(self._let_go(worker, handle), name=f"move of {handle.name}")

    async def _let_go(self, worker: str, handle: Handle) -> None:
        await self._changes.until(lambda: not self._is_busy(worker, handle))
        try:
            await answer(self._executor, worker, Unload(handle.name), Unloaded)
        except DenoisedError as error:
            # It died meanwhile, and is empty.
            logger.debug("%s did not hold %s: %s", worker, handle.name, error)

    def _is_on(self, worker: str, *states: State) -> bool:
        """Whether a pipeline is there, or one in one of these states."""
        return any(handle.worker == worker and handle.state in (states or State) for handle in self._handles)

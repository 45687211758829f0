"""Updates of live pipelines: the worker changes the pipeline, and the recipe remembers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from denoised.errors import PipelineNotFoundError

from .builds import answer
from .executor import Executor
from .handles import Handle
from .messages import Loaded, PipelineSettings, Update

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Change:
    """Settings to change, by name, and what they are to be; "features.freeu" is one entry of a setting."""

    names: frozenset[str]
    settings: PipelineSettings

    def apply(self, present: PipelineSettings) -> PipelineSettings:
        for path in sorted(self.names):
            name, _, key = path.partition(".")
            new = getattr(self.settings, name)
            if key:
                kept = {other: value for other, value in getattr(present, name).items() if other != key}
                new = kept | ({key: new[key]} if key in new else {})
            present = replace(present, **{name: new})
        return present


class Updates:
    """Updates pipelines, those of one handle one after another.

    `bring_back` returns with a handle's pipeline live on a worker, `is_building` says whether it is on its way to one,
    `missing` hears that the worker does not hold it after all, and `updated` records what a worker has set.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        bring_back: Callable[[Handle], Awaitable[None]],
        is_building: Callable[[Handle], bool],
        missing: Callable[[Handle], None],
        updated: Callable[[Handle, Loaded], None],
    ) -> None:
        self._executor = executor
        self._bring_back = bring_back
        self._is_building = is_building
        self._missing = missing
        self._updated = updated
        self._last: dict[Handle, asyncio.Future[None]] = {}
        self._workers: dict[Handle, str] = {}

    def runs_on(self, worker: str, handle: Handle | None = None) -> bool:
        """Whether that worker is changing a pipeline, or that pipeline."""
        return any(there == worker and handle in (None, one) for one, there in self._workers.items())

    async def update(self, handle: Handle, change: Change) -> None:
        """Returns once the worker has changed the pipeline and the recipe says so."""
        before, mine = self._last.get(handle), asyncio.get_running_loop().create_future()
        self._last[handle] = mine
        try:
            if before is not None:
                await before
            await self._update(handle, change)
        finally:
            mine.set_result(None)
            if self._last.get(handle) is mine:
                del self._last[handle]

    async def _update(self, handle: Handle, change: Change) -> None:
        has_retried, worker, loaded = False, "", None
        # The worker may have died or been drained meanwhile, and the pipeline be elsewhere by the recipe as it was.
        while loaded is None or handle.worker not in (worker, "") or self._is_building(handle):
            await self._bring_back(handle)
            worker, held = handle.worker, handle.loaded
            self._workers[handle] = worker
            try:
                command = Update(handle.name, change.apply(handle.recipe.settings))
                loaded = await answer(self._executor, worker, command, Loaded)
            except PipelineNotFoundError:
                if has_retried:
                    raise
                logger.warning("%s does not hold %s, which is built again", worker, handle.name)
                has_retried = True
                # Another request may have found out first.
                if handle.loaded is held:
                    self._missing(handle)
            finally:
                del self._workers[handle]
        self._updated(handle, loaded)

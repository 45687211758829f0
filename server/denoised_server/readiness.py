"""Readiness: the pipelines that the configuration declares, brought up, kept up, and tried where that is asked for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from denoised.errors import DeadlineExceededError, DenoisedError, UnavailableError

from .background import Background
from .condition import Condition
from .preloads import Preload
from .probes import Standing

logger = logging.getLogger(__name__)

# Between two tries to bring a declared pipeline up.
RETRY_SECONDS = 5.0
# Between two generations that only show that a pipeline generates.
TRIAL_SECONDS = 15.0
# How long one of them may take.
TRIAL_TIMEOUT = 120.0


class Readiness:
    """Owns how declared pipelines stand.

    `load` returns with one live, `is_live` says whether it still is. `generate` runs one, `is_busy` says that its
    worker has work to do, which is a trial, too; without `generate`, a pipeline that is live is believed to work.
    """

    def __init__(
        self,
        preloads: Sequence[Preload],
        *,
        load: Callable[[Preload], Awaitable[None]],
        is_live: Callable[[str], bool],
        generate: Callable[[str], Awaitable[None]] | None,
        is_busy: Callable[[str], bool],
        changed: Callable[[], None],
    ) -> None:
        self._preloads = {preload.name: preload for preload in preloads}
        self._load = load
        self._is_live = is_live
        self._generate = generate
        self._is_busy = is_busy
        self._changed = changed
        self._background = Background()
        self._changes = Condition()
        # Those that were live and generated; and the reasons of the last failures.
        self._proven: set[str] = set()
        self._failures: dict[str, str] = {}
        self._has_been_ready = not preloads

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._preloads)

    @property
    def has_been_ready(self) -> bool:
        """Whether all were usable at some time."""
        return self._has_been_ready

    def standings(self) -> Mapping[str, Standing]:
        return {
            name: Standing(name in self._proven and self._is_live(name), self._failures.get(name, ""))
            for name in self._preloads
        }

    def note_change(self) -> None:
        """Some pipeline or worker is not as it was."""
        self._changes.notify()

    async def bring_up(self) -> None:
        """Returns when all are usable. Raises what is wrong with one that trying again does not mend."""
        try:
            async with asyncio.TaskGroup() as group:
                for preload in self._preloads.values():
                    group.create_task(self._begin(preload))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        self._has_been_ready = True
        self._changed()
        for preload in self._preloads.values():
            self._background.spawn(self._keep_up(preload), name=f"readiness of {preload.name}")

    async def stop(self) -> None:
        await self._background.stop()

    async def _begin(self, preload: Preload) -> None:
        while True:
            if await self._is_usable(preload):
                return
            await asyncio.sleep(RETRY_SECONDS)

    async def _keep_up(self, preload: Preload) -> None:
        while True:
            if preload.name in self._proven and self._is_live(preload.name):
                await self._wait(preload)
            try:
                is_usable = await self._is_usable(preload)
            except DenoisedError:
                is_usable = False
            if not is_usable:
                await asyncio.sleep(RETRY_SECONDS)

    async def _wait(self, preload: Preload) -> None:
        """Returns when the pipeline is live no more, or is to be tried again."""
        try:
            async with asyncio.timeout(TRIAL_SECONDS if self._generate else None):
                await self._changes.until(lambda: not self._is_live(preload.name))
        except TimeoutError:
            logger.debug("%s is tried again", preload.name)

    async def _is_usable(self, preload: Preload) -> bool:
        """Brings one up and tries it. Raises what keeps it from being loaded where another try does not help."""
        name = preload.name
        if not self._is_live(name):
            self._note(name, is_proven=False, failure=self._failures.get(name, ""))
            try:
                await self._load(preload)
            except DenoisedError as error:
                logger.error("%s is to be loaded and could not be: %s", name, error)
                if _may_pass(error):
                    return False
                self._note(name, is_proven=False, failure=error.reason)
                raise
        if self._generate is not None and not (name in self._proven and self._is_busy(name)):
            try:
                async with asyncio.timeout(TRIAL_TIMEOUT):
                    await self._generate(name)
            except TimeoutError:
                logger.error("%s was tried and did not generate within %g s", name, TRIAL_TIMEOUT)
                # Behind the work of others it says nothing of the pipeline.
                if not (self._is_live(name) and self._is_busy(name)):
                    self._note(name, is_proven=False, failure=DeadlineExceededError.reason)
                return False
            except DenoisedError as error:
                logger.error("%s was tried and did not generate: %s", name, error)
                if not _may_pass(error):
                    self._note(name, is_proven=False, failure=error.reason)
                return False
        self._note(name, is_proven=True)
        return True

    def _note(self, name: str, *, is_proven: bool, failure: str = "") -> None:
        (self._proven.add if is_proven else self._proven.discard)(name)
        self._failures[name] = failure
        self._changed()


def _may_pass(error: DenoisedError) -> bool:
    return isinstance(error, UnavailableError) or error.retry_after is not None

"""Detached generations: in the journal from the moment they are accepted until their results are let go of."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from denoised import errors
from denoised.errors import DenoisedError, InternalError, JournalUnavailableError

from .eventlog import Numbered
from .generation import Generation, GenerationEvent, GenerationView, State, Summary, Terms
from .journal import Journal, Row
from .messages import Generate
from .replays import digest
from .retention import Result, Retention

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pending:
    """A generation that an earlier process accepted and did not finish."""

    view: GenerationView
    request_id: str
    asked: Generate
    command: Generate


@dataclass(frozen=True, slots=True)
class _Kept:
    view: GenerationView
    request_id: str
    digest: str
    error: DenoisedError | None


class Detached:
    """Owns what is kept of detached generations.

    Requests are kept while they have not been run to their end, prompts and images included, unless `keeps_requests`
    is off: then a generation does not survive the daemon's end, and the manifest of a kept result does not say what was
    asked.
    """

    def __init__(self, journal: Journal, retention: Retention, *, keeps_requests: bool) -> None:
        self._journal = journal
        self._retention = retention
        self._keeps_requests = keeps_requests
        self._kept: dict[str, _Kept] = {}

    def __iter__(self) -> Iterator[GenerationView]:
        return iter([self._view(kept) for kept in self._kept.values()])

    async def open(self) -> list[Pending]:
        """Reads what earlier processes kept; returns what has to be run again, oldest first."""
        pending = []
        for name, (data, request) in (await self._journal.generations()).items():
            view: GenerationView = data["view"]
            if view.end_time:
                self._kept[name] = _Kept(view, data["request_id"], data["digest"], _error(data["error"]))
            elif request is not None:
                pending.append(Pending(view, data["request_id"], request["asked"], request["command"]))
            else:
                lost = errors.WorkerLostError("The daemon ended while this ran, and requests are not kept.")
                await self._end(replace(view, state=State.FAILED, end_time=view.create_time), data, lost, ())
        return sorted(pending, key=lambda one: one.view.number)

    async def accept(self, generation: Generation) -> None:
        """Returns when the generation will be run whatever happens to this process."""
        request = {"asked": generation.asked, "command": generation.command} if self._keeps_requests else None
        await self._journal.keep_generation(generation.name, _data(generation), request)

    async def finish(self, generation: Generation) -> None:
        """Returns when its result is kept."""
        error = generation.log.error
        known = error if isinstance(error, DenoisedError) or error is None else InternalError("The daemon failed.")
        entries = generation.log.entries
        if not self._keeps_requests:
            entries = tuple(replace(entry, event=_without_request(entry.event)) for entry in entries)
        await self._end(generation.view(), _data(generation), known, entries)

    async def refuse(self, pending: Pending, error: DenoisedError, now: float) -> None:
        """Ends one that cannot be run again."""
        view = replace(pending.view, state=State.FAILED, end_time=now).with_error(error)
        data = {"request_id": pending.request_id, "digest": digest(pending.asked)}
        await self._end(view, data, error, ())

    async def _end(
        self,
        view: GenerationView,
        data: Row,
        error: DenoisedError | None,
        events: Sequence[Numbered[GenerationEvent]],
    ) -> None:
        data = {**data, "view": view, "error": _fields(error)}
        size = await self._journal.end_generation(view.name, data, [(entry.sequence, entry.event) for entry in events])
        view = replace(view, size_bytes=size)
        self._kept[view.name] = _Kept(view, data["request_id"], data["digest"], error)

    def find(self, name: str) -> GenerationView | None:
        kept = self._kept.get(name)
        return self._view(kept) if kept else None

    def find_request(self, terms: Terms, asked: Generate) -> tuple[GenerationView | None, bool]:
        """The generation that a request was answered with, and whether it was the same request."""
        for kept in self._kept.values():
            if (kept.view.owner, kept.request_id) == terms.key:
                return self._view(kept), kept.digest == digest(asked)
        return None, False

    async def read(self, name: str) -> tuple[list[Numbered[GenerationEvent]], DenoisedError | None]:
        """All events of one that is over, and the error that it ended with."""
        events = await self._journal.events(name)
        kept = self._kept.get(name)
        return [Numbered(sequence, event) for sequence, event in events], kept.error if kept else None

    async def tidy(self, now: float) -> None:
        """Lets go of what has been kept long enough, or takes too much."""
        results = [Result(name, kept.view.size_bytes, kept.view.end_time) for name, kept in self._kept.items()]
        if gone := self._retention.surplus(results, now):
            try:
                await self._journal.forget_generations(gone)
            except JournalUnavailableError as error:
                logger.error("%d results cannot be let go of: %s", len(gone), error)
                return
            for name in gone:
                self._kept.pop(name, None)

    def _view(self, kept: _Kept) -> GenerationView:
        return replace(kept.view, expire_time=self._retention.expire_time(kept.view.end_time))


def _without_request(event: GenerationEvent) -> GenerationEvent:
    if not isinstance(event, Summary):
        return event
    command = replace(event.making.command, arguments={})
    return replace(event, making=replace(event.making, command=command))


def _data(generation: Generation) -> dict[str, Any]:
    return {
        "view": generation.view(),
        "request_id": generation.terms.request_id,
        "digest": digest(generation.asked),
        "error": None,
    }


def _fields(error: DenoisedError | None) -> dict[str, Any] | None:
    if error is None:
        return None
    return {
        "reason": error.reason,
        "message": error.message,
        "hint": error.hint,
        "retry_after": error.retry_after,
        "metadata": error.metadata,
    }


def _error(fields: dict[str, Any] | None) -> DenoisedError | None:
    if fields is None:
        return None
    kind = errors.BY_REASON.get(fields["reason"], DenoisedError)
    return kind(fields["message"], hint=fields["hint"], retry_after=fields["retry_after"], metadata=fields["metadata"])

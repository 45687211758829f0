"""A log of events: numbered from 1, for any number of readers, each from where it likes."""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from .condition import Condition

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Numbered(Generic[T]):
    """An event and its number; one that is not counted has the number of the event before it."""

    sequence: int
    event: T


class EventLog(Generic[T]):
    """Events in order, then an end or an error, which every reader gets."""

    def __init__(self) -> None:
        self._entries: list[Numbered[T]] = []
        self._sequence = 0
        self._is_ended = False
        self._error: Exception | None = None
        self._news = Condition()
        self._shown: dict[Hashable, tuple[int, Numbered[T]]] = {}
        self._show_count = 0

    @property
    def entries(self) -> tuple[Numbered[T], ...]:
        return tuple(self._entries)

    @property
    def is_ended(self) -> bool:
        return self._is_ended

    @property
    def error(self) -> Exception | None:
        return self._error

    def put(self, event: T, *, at_least: int | None = 0) -> None:
        """Adds an event, under the next number that is at least so much.

        With None it is not counted: it would be different if all happened again, which numbers must not be.
        """
        if not self._is_ended:
            if at_least is not None:
                self._sequence = max(self._sequence + 1, at_least)
            self._entries.append(Numbered(self._sequence, event))
            self._news.notify()

    def show(self, key: Hashable, event: T) -> None:
        """Gives an event to those readers who have read all others, in place of the last one with the same key.

        It is not kept, nor counted: who is late, or comes back, does without.
        """
        if not self._is_ended:
            self._show_count += 1
            self._shown[key] = self._show_count, Numbered(self._sequence, event)
            self._news.notify()

    def end(self, error: Exception | None = None) -> None:
        """Lets readers have what is there, then stop or raise. The first end counts."""
        if not self._is_ended:
            self._is_ended, self._error = True, error
            self._news.notify()

    async def read(self, after: int = 0) -> AsyncGenerator[Numbered[T], None]:
        """What comes after an event, from the first one on; then what happens."""
        seen = self._show_count
        position = len(self._entries) - len(list(behind(self._entries, after)))
        while True:
            while position < len(self._entries):
                position += 1
                yield self._entries[position - 1]
            if self._is_ended:
                break
            if fresh := [shown for shown in self._shown.values() if shown[0] > seen]:
                # One at a time, and the oldest first: what comes meanwhile goes before.
                seen, entry = min(fresh, key=lambda shown: shown[0])
                yield entry
                continue
            await self._news.until(partial(self._has_more, position, seen))
        if self._error is not None:
            # A copy: each reader adds its own traceback to what it raises.
            raise copy.copy(self._error)

    def _has_more(self, position: int, seen: int) -> bool:
        return position < len(self._entries) or seen < self._show_count or self._is_ended


def behind(entries: Iterable[Numbered[T]], after: int) -> Iterable[Numbered[T]]:
    """The entries that come after an event."""
    return (entry for entry in entries if entry.sequence > after or after == 0)

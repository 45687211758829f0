"""Replays: what becomes of a request whose worker died, and which requests are not run any more."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, replace
from enum import Enum, auto

from denoised.errors import RequestKillsWorkerError

from . import codec
from .messages import Generate

MAX_REPLAYS = 2
# Workers that died under a request which had them to itself, until it is held to be the cause.
MAX_DEATHS_ALONE = 2
MEMORY_SECONDS = 3600.0
MAX_REMEMBERED = 1000


class Verdict(Enum):
    """What to do with a request whose worker died."""

    REPLAY = auto()
    # So that one more death is nobody else's.
    REPLAY_ALONE = auto()
    # It is the request that kills workers.
    REFUSE = auto()
    # It had bad luck too often.
    GIVE_UP = auto()


@dataclass(slots=True)
class Deaths:
    """The workers that died under one request.

    Any of the requests that ran on a worker may have killed it. All are replayed together, since most deaths have
    causes of their own; who sees a second one in company is replayed alone, and so is convicted or cleared for sure.
    """

    count: int = 0

    def judge(self, *, was_alone: bool) -> Verdict:
        """Takes one more death into account; `was_alone` says that nothing else ran on the worker."""
        self.count += 1
        if was_alone and self.count >= MAX_DEATHS_ALONE:
            return Verdict.REFUSE
        if self.count > MAX_REPLAYS:
            return Verdict.GIVE_UP
        return Verdict.REPLAY if self.count < MAX_REPLAYS else Verdict.REPLAY_ALONE


def digest(command: Generate) -> str:
    """The same for requests that ask for the same."""
    # Whoever asks again has less time left.
    return hashlib.sha256(codec.encode(replace(command, timeout=None)).encode()).hexdigest()


class Refusals:
    """Requests that killed workers, remembered for a while by their digest."""

    def __init__(self) -> None:
        self._until: OrderedDict[str, float] = OrderedDict()

    def remember(self, command: Generate, now: float) -> None:
        self._until[digest(_anyhow(command))] = now + MEMORY_SECONDS
        while len(self._until) > MAX_REMEMBERED:
            self._until.popitem(last=False)

    def check(self, command: Generate, now: float) -> None:
        """Raises RequestKillsWorkerError for one that is remembered."""
        while self._until and next(iter(self._until.values())) <= now:
            self._until.popitem(last=False)
        # A digest takes time where images are large, and there is nearly never anything to compare it with.
        if self._until and digest(_anyhow(command)) in self._until:
            raise refusal()


def refusal() -> RequestKillsWorkerError:
    return RequestKillsWorkerError(
        f"Workers died when they ran this request, which is not run again for {MEMORY_SECONDS / 60:g} minutes.",
        hint="Change it, for example to a smaller size or to fewer images; the daemon's log says how the workers died.",
    )


def _anyhow(command: Generate) -> Generate:
    """What does not make it another request: how soon it runs, and in what form its outputs travel."""
    return replace(command, priority=0, media_type="", quality=0, preview=None)

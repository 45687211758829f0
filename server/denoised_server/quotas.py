"""Quotas: how much of the daemon one client may use, and what it has used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from denoised.errors import QuotaExceededError
from denoised.values import Plain

from .callers import Caller
from .messages import Parameter

# What the work of a request is made of, and what counts where neither the request nor the pipeline's defaults say it.
ASSUMED = {"height": 1024, "width": 1024, "num_inference_steps": 50, "num_images_per_prompt": 1}
# After a client's own request ends it may send another: soon, and nobody knows when.
RETRY_SECONDS = 1.0
MINUTE = 60.0


@dataclass(slots=True)
class _Bucket:
    """Requests that may be sent at once; it fills up again over a minute."""

    tokens: float
    filled: float

    def take(self, limit: int, now: float) -> float:
        """Takes one and returns 0, or the seconds until there is one."""
        self.tokens = min(limit, self.tokens + (now - self.filled) * limit / MINUTE)
        self.filled = now
        if self.tokens >= 1:
            self.tokens -= 1
            return 0.0
        return (1 - self.tokens) * MINUTE / limit if limit else MINUTE


class Quotas:
    """Counts by the names of clients, of which the file of tokens has a bounded number."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}
        self._waiting = Counter[str]()

    def count_request(self, caller: Caller, now: float) -> None:
        """Raises QuotaExceededError when the client sends more requests in a minute than it may."""
        limit = caller.quota.requests_per_minute
        if limit is None:
            return
        bucket = self._buckets.setdefault(caller.name, _Bucket(limit, now))
        if wait := bucket.take(limit, now):
            raise _exceeded("requests_per_minute", f"{limit:,} requests in a minute", retry_after=wait)

    def enter(self, caller: Caller) -> None:
        """A generation of the client begins to wait. Raises QuotaExceededError when too many do; else `leave` it."""
        limit = caller.quota.waiting
        if limit is not None and self._waiting[caller.name] >= limit:
            raise _exceeded("waiting", f"{limit:,} generations that wait", retry_after=RETRY_SECONDS)
        self._waiting[caller.name] += 1

    def leave(self, caller: Caller) -> None:
        """A generation of the client waits no longer: it runs, or has ended."""
        self._waiting[caller.name] -= 1
        if not self._waiting[caller.name]:
            del self._waiting[caller.name]


def check_pipelines(caller: Caller, held: int) -> None:
    """Raises QuotaExceededError when a client that holds so many pipelines may not hold one more."""
    limit = caller.quota.pipelines
    if limit is not None and held >= limit:
        raise _exceeded("pipelines", f"{limit:,} pipelines", hint="Unload one that is not needed.")


def check_exclusive_bytes(caller: Caller, held: int) -> None:
    """Raises QuotaExceededError when only this client's pipelines keep more than it may."""
    limit = caller.quota.exclusive_bytes
    if limit is not None and held > limit:
        raise _exceeded(
            "exclusive_bytes", f"{limit:,} bytes of weights of its own", hint="Unload a pipeline that is not needed."
        )


def check_priority(caller: Caller, priority: int) -> None:
    """Raises QuotaExceededError when a request wants to go before others that this client may not go before."""
    limit = caller.quota.priority
    if limit is not None and priority > limit:
        raise _exceeded("priority", f"a priority of {limit}", hint="Ask for a lower one.")


def check_work(caller: Caller, arguments: Mapping[str, Plain], parameters: Iterable[Parameter]) -> None:
    """Raises QuotaExceededError when one request is larger than the client may ask for."""
    limit = caller.quota.pixel_steps
    if limit is None:
        return
    known = {parameter.name: parameter.default for parameter in parameters} | dict(arguments)
    prompt = arguments.get("prompt")
    work = len(prompt) if isinstance(prompt, list | tuple) else 1
    for name, assumed in ASSUMED.items():
        value = known.get(name)
        work *= math.ceil(value) if isinstance(value, int | float) and value >= 1 else assumed
    if work > limit:
        raise _exceeded(
            "pixel_steps",
            f"{limit:,} pixels times steps in a request, and this one takes {work:,}",
            hint="Ask for a smaller picture, fewer steps or fewer images, and say each of them.",
        )


def _exceeded(quota: str, limit: str, *, hint: str = "", retry_after: float | None = None) -> QuotaExceededError:
    return QuotaExceededError(
        f"This client may use {limit} at most.",
        hint=hint or "Try again later, or ask whoever runs the daemon for more.",
        retry_after=retry_after,
        metadata={"quota": quota},
    )

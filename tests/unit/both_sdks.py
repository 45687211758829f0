"""The blocking SDK in the clothes of the asyncio one, so that one program runs on both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import denoised
import denoised.aio

# Plain methods in both.
PLAIN = ("to", "set_progress_bar_config")
WRAPPED = (denoised.Client, denoised.GenerationStream, denoised.Job, denoised.Pipeline, denoised.Stream)


class AsyncSdk:
    """The asyncio SDK as it is."""

    Client = denoised.aio.AsyncClient
    AutoPipelineForText2Image = denoised.aio.AutoPipelineForText2Image
    AutoPipelineForImage2Image = denoised.aio.AutoPipelineForImage2Image
    AutoPipelineForInpainting = denoised.aio.AutoPipelineForInpainting


class BlockingSdk:
    """The blocking SDK; its calls run in threads."""

    def __getattr__(self, name: str) -> Any:
        kind = getattr(denoised, name)
        return Awaited(kind) if name.startswith("Auto") else lambda *args, **kwargs: Awaited(kind(*args, **kwargs))


class Awaited:
    """An object of the blocking SDK whose methods are awaited."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if name in PLAIN:
            return lambda *args, **kwargs: _wrap(value(*args, **kwargs))
        if name in ("generate", "resume", "watch", "watch_workers"):
            return lambda *args, **kwargs: Awaited(value(*_unwrap(args), **kwargs))
        return _in_thread(value) if callable(value) else _wrap(value)

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return await _in_thread(self.inner)(*args, **kwargs)

    async def __aenter__(self) -> Any:
        self.inner.__enter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await asyncio.to_thread(self.inner.__exit__, *error)

    async def __aiter__(self) -> AsyncIterator[Any]:
        events = iter(self.inner)
        try:
            while (event := await asyncio.to_thread(next, events, None)) is not None:
                yield event
        finally:
            events.close()

    def __repr__(self) -> str:
        return repr(self.inner)


def _in_thread(function: Any) -> Any:
    async def call(*args: Any, **kwargs: Any) -> Any:
        kwargs = {name: _unwrap([value])[0] for name, value in kwargs.items()}
        return _wrap(await asyncio.to_thread(function, *_unwrap(args), **kwargs))

    return call


def _wrap(value: Any) -> Any:
    if isinstance(value, list):
        return [_wrap(item) for item in value]
    return Awaited(value) if isinstance(value, WRAPPED) else value


def _unwrap(values: Any) -> list[Any]:
    return [value.inner if isinstance(value, Awaited) else value for value in values]

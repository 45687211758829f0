"""Keeps requests away from the moments in which a loader has changed torch for the whole process.

While diffusers and transformers build a module, before they read its weights, they set torch's default dtype and
patch its initialisers. A tensor that a request makes in such a moment has the wrong dtype. Requests therefore take
turns with construction, while reading weights, which takes most of a load's time, goes on beside them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import diffusers.models.modeling_utils
import torch
import transformers.modeling_utils
from diffusers.loaders import single_file_model, single_file_utils

from . import randomness


class Construction:
    """One room: the engine is in it for each of its turns, a loader while it builds a module.

    The turnstile before it makes a loader's wait end with the engine's present turn: the engine cannot come back in
    before a loader that stands there.
    """

    def __init__(self) -> None:
        self._turnstile, self._room = threading.Lock(), threading.Lock()
        self._loader = threading.local()
        self._last = self._owner = 0
        # Whether construction can be told from reading in the installed libraries; if not, a loader keeps the room.
        self._narrowed = False

    @property
    def is_mine(self) -> bool:
        """Whether this thread is in the room: it must not wait for others who want to come in."""
        return self._owner == threading.get_ident()

    def turn(self) -> AbstractContextManager[None]:
        """The engine's: from resuming requests to the end of a batch."""
        return _Turn(self._come_in, self._go_out)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """A loader's, around all its work: on this thread, construction now waits for the room by itself.

        Leaves torch's default dtype as it was, also when building fails half-way: diffusers does not.
        """
        default = torch.get_default_dtype()
        self._loader.depth = 0
        if not self._narrowed:
            self.enter()
        try:
            yield
        finally:
            _set_default_dtype(default)
            if self._loader.depth:
                self._go_out()
            del self._loader.depth

    def enter(self) -> None:
        depth = getattr(self._loader, "depth", None)
        if depth is None:
            return
        if depth == 0:
            self._come_in()
        self._loader.depth = depth + 1

    def leave(self) -> None:
        if depth := getattr(self._loader, "depth", 0):
            self._loader.depth = depth - 1
            if depth == 1:
                self._go_out()

    def _come_in(self) -> None:
        with self._turnstile:
            self._room.acquire()
        last, self._last = self._last, threading.get_ident()
        self._owner = self._last
        if last != self._last:
            # Modules are built with random weights.
            randomness.put_away()

    def _go_out(self) -> None:
        self._owner = 0
        self._room.release()

    def install(self) -> None:
        """Makes the libraries' construction enter and leave; once for the process."""
        construction = self

        def set_default_dtype(dtype: torch.dtype) -> None:
            # Both libraries set the dtype, build, and set it back; float32 is where the process stands.
            before = torch.get_default_dtype()
            if before == torch.float32 != dtype:
                construction.enter()
            _set_default_dtype(dtype)
            if before != torch.float32 == dtype:
                construction.leave()

        torch.set_default_dtype = set_default_dtype
        for module in (diffusers.models.modeling_utils, transformers.modeling_utils):
            if hasattr(module, "ContextManagers"):
                module.ContextManagers = _entering(module.ContextManagers, construction)
                self._narrowed = True
        # Reading single files patches modules while it builds one.
        for module in (single_file_model, single_file_utils):
            if hasattr(module, "init_empty_weights"):
                module.init_empty_weights = self._around(module.init_empty_weights)

    def _around(self, original: Callable[..., AbstractContextManager[Any]]) -> Callable[..., Any]:
        @contextmanager
        def entering(*args: Any, **kwargs: Any) -> Iterator[None]:
            self.enter()
            try:
                with original(*args, **kwargs):
                    yield
            finally:
                self.leave()

        return entering


class _Turn(AbstractContextManager[None]):
    """By hand, because there is one for each batch."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._begin, self._end = begin, end

    def __enter__(self) -> None:
        self._begin()

    def __exit__(self, *_: object) -> None:
        self._end()


def _entering(original: type[Any], construction: Construction) -> Callable[..., Any]:
    class EnteringContextManagers(original):
        def __enter__(self) -> Any:
            construction.enter()
            return super().__enter__()

        def __exit__(self, *args: Any) -> Any:
            try:
                return super().__exit__(*args)
            finally:
                construction.leave()

    return EnteringContextManagers


_set_default_dtype = torch.set_default_dtype

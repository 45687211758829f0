"""Previews of `pipe(...)`: what is being made, while it is made."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from PIL import Image

from . import media
from .errors import InvalidFieldError
from .v1 import generation_service_pb2 as pb
from .values import artifact_from_proto


@dataclass(frozen=True, slots=True)
class Preview:
    """A rough picture of one image that is being made.

    Attributes:
        image: The picture.
        index: Which of the images it is of.
        completed_steps: Denoising steps done.
        total_steps: Denoising steps in all.
    """

    image: Image.Image
    index: int
    completed_steps: int
    total_steps: int

    @classmethod
    def of(cls, message: pb.Preview) -> Preview:
        image = media.unpack(artifact_from_proto(message.artifact))
        return cls(image, message.index, message.completed_steps, message.total_steps)


OnPreview: TypeAlias = Callable[[Preview], object]


class Previews:
    """Those of one call, shown to its function, or else in the notebook that it is made from."""

    def __init__(self, step_interval: int | None, function: OnPreview | None, size: int) -> None:
        """Raises InvalidFieldError."""
        self._notebook: _Notebook | None = None
        if function is not None and not callable(function):
            raise InvalidFieldError.of(
                "on_preview", f"a {type(function).__name__} cannot be called.", hint="Give a function."
            )
        if function is not None and step_interval is None:
            step_interval = 1
        if function is None and step_interval is not None:
            function = self._notebook = _notebook()
        self._function = function
        self._options = None if step_interval is None or function is None else _options(step_interval, size)

    def ask(self, request: pb.GenerateRequest) -> None:
        """Has them made, where somebody will look at them."""
        if self._options is not None:
            request.preview.CopyFrom(self._options)

    def show(self, message: pb.Preview) -> None:
        if self._function is not None:
            self._function(Preview.of(message))

    def close(self) -> None:
        """Clears away what the notebook shows."""
        if self._notebook is not None:
            self._notebook.clear()


def _options(step_interval: int, size: int) -> pb.PreviewOptions:
    try:
        return pb.PreviewOptions(step_interval=operator.index(step_interval), size=operator.index(size))
    except (TypeError, ValueError) as error:
        raise InvalidFieldError.of("preview", f"{error}.", hint="Give a number of steps, such as 2.") from error


class _Notebook:
    """The latest preview of each image, in the output of the cell."""

    def __init__(self, display: Any) -> None:
        self._display = display
        self._handles: dict[int, Any] = {}

    def __call__(self, preview: Preview) -> None:
        handle = self._handles.get(preview.index)
        if handle is None:
            self._handles[preview.index] = self._display.display(preview.image, display_id=True)
        else:
            handle.update(preview.image)

    def clear(self) -> None:
        for handle in self._handles.values():
            handle.update(self._display.HTML(""))


def _notebook() -> _Notebook | None:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    # A shell in a terminal has no kernel, and shows no pictures.
    return _Notebook(sys.modules["IPython.display"]) if hasattr(shell, "kernel") else None

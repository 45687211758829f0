"""Progress bars, as diffusers shows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from tqdm.auto import tqdm

from .v1.pipeline_service_pb2 import LoadProgress

PHASES = {
    "text_encode": "encoding the prompt",
    "image_encode": "encoding the image",
    "denoise": "denoising",
    "decode": "decoding",
    "safety_check": "checking",
    "encode": "writing",
}


def bar_over(config: Mapping[str, Any], iterable: Iterable[Any] | None, total: int | None) -> tqdm[Any]:
    """A bar as a pipeline of diffusers makes it. Raises ValueError without an iterable or a total."""
    if iterable is None and total is None:
        raise ValueError("Either `total` or `iterable` has to be defined.")
    return tqdm(iterable, **config) if iterable is not None else tqdm(total=total, **config)


class Bar:
    """A bar that appears with the first news and is closed at the end."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = dict(config)
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _open(self, config: Mapping[str, Any]) -> tqdm[Any]:
        self._bar = tqdm(**config)
        return self._bar

    def _show(self, completed: int, total: int, **config: Any) -> tqdm[Any]:
        bar = self._bar if self._bar is not None else self._open({"total": total, **config, **self._config})
        # A total may grow while the work goes on.
        bar.total = total
        bar.update(completed - bar.n)
        return bar


class DenoisingBar(Bar):
    """Steps of one generation; while it waits, how many are before it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._is_waiting = False

    def wait(self, position: int) -> None:
        """Shows the place in the queue."""
        self._say(f"waiting, {position} before this one" if position else "waiting, next in line")

    def step(self, completed: int, total: int) -> None:
        """Shows denoising steps."""
        if self._is_waiting:
            # The waiting line has no room for steps: it gives way to a bar.
            self.close()
            self._is_waiting = False
        self._show(completed, total)

    def enter(self, phase: str) -> None:
        """Shows what is done before the first step, and after the last."""
        if self._bar is None or self._is_waiting:
            self._say(PHASES.get(phase, phase))
        else:
            self._bar.set_postfix_str(PHASES.get(phase, phase) if phase != "denoise" else "")

    def _say(self, text: str) -> None:
        bar = self._bar
        if bar is None:
            bar = self._open({**self._config, "bar_format": "{desc}", "leave": False})
        self._is_waiting = True
        bar.set_description_str(text)


class LoadingBar(Bar):
    """Bytes of one load."""

    def __call__(self, progress: LoadProgress) -> None:
        """Shows how far the load is."""
        bar = self._show(
            progress.completed_bytes,
            progress.total_bytes,
            desc="Loading pipeline components...",
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
        )
        bar.set_postfix_str(progress.role or progress.phase)

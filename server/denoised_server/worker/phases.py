"""Phases of a generation: what its component calls are for, and when they ran."""

from __future__ import annotations

import time

from denoised_server.messages import Phase
from torch import nn
from transformers import PreTrainedModel


def of(module: nn.Module, method: str) -> str:
    """The phase that a call belongs to, by what kind of component it is of."""
    if method == "decode":
        return "decode"
    name = type(module).__name__
    if "SafetyChecker" in name:
        return "safety_check"
    if method == "encode" or "Vision" in name:
        return "image_encode"
    return "text_encode" if isinstance(module, PreTrainedModel) else "denoise"


class Phases:
    """Those of one request. Calls of one phase that follow each other are one run of it."""

    def __init__(self) -> None:
        self._runs: list[Phase] = []

    def note(self, name: str, seconds: float) -> None:
        """A call has just ended that took so long."""
        now = time.time()
        start = now - seconds
        if self._runs and self._runs[-1].name == name:
            start = self._runs.pop().start_time
        self._runs.append(Phase(name, start, now))

    def runs(self) -> tuple[Phase, ...]:
        """In the order in which they began."""
        return tuple(self._runs)

"""How long a phase of a load will take, by how fast it was so far. Policy only: the time is an argument."""

from __future__ import annotations

from dataclasses import dataclass

# Before that, a phase has shown too little.
TELLING_SECONDS = 0.2


@dataclass(slots=True)
class LoadPace:
    """Follows the bytes of one phase after another."""

    phase: str = ""
    _began: float = 0.0
    _first: int = 0

    def remaining(self, phase: str, completed: int, total: int, now: float) -> float | None:
        """Seconds until the phase ends; None while that cannot be told."""
        if phase != self.phase:
            self.phase, self._began, self._first = phase, now, completed
        seconds, came = now - self._began, completed - self._first
        if seconds < TELLING_SECONDS or came <= 0 or total < completed:
            return None
        return (total - completed) * seconds / came

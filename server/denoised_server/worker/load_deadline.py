"""How long a load may take: a while, and more for each byte of its phases. Policy only: the time is an argument."""

from __future__ import annotations

from dataclasses import dataclass, field

from denoised.errors import LoadTimedOutError


@dataclass(slots=True)
class LoadDeadline:
    """One load's. `bytes_per_second` is what each of its phases is at least expected to do, after `seconds` in all.

    The time between `pause` and `resume`, in which it waits for other loads, does not count.
    """

    seconds: float
    bytes_per_second: float
    _phase: str = ""
    _done: int = 0
    _totals: dict[str, int] = field(default_factory=dict)
    _spent: float = 0.0
    _since: float | None = None

    def resume(self, now: float) -> None:
        self._since = now

    def pause(self, now: float) -> None:
        if self._since is not None:
            self._spent, self._since = self._spent + now - self._since, None

    def note(self, phase: str, completed: int, total: int) -> None:
        """A phase has so many bytes, and has done so many of them."""
        self._phase, self._done = phase, completed
        self._totals[phase] = max(total, self._totals.get(phase, 0))

    @property
    def allowed_seconds(self) -> float:
        return self.seconds + sum(self._totals.values()) / self.bytes_per_second

    def check(self, now: float) -> None:
        """Raises LoadTimedOutError when the time is over."""
        spent = self._spent + (0.0 if self._since is None else now - self._since)
        if spent <= self.allowed_seconds:
            return
        total = self._totals.get(self._phase, 0)
        raise LoadTimedOutError(
            f"The load took longer than the {self.allowed_seconds:,.0f} s that it was given, and was ended while "
            f"{self._phase or 'beginning'} ({self._done:,} of {total:,} bytes).",
            hint="Try again, or let the daemon have slower disks and networks: load_timeout, load_bytes_per_second.",
            metadata={
                "phase": self._phase,
                "completed_bytes": str(self._done),
                "total_bytes": str(total),
                "allowed_seconds": f"{self.allowed_seconds:.3f}",
            },
        )

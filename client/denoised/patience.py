"""Patience: how long a client goes on trying to reach a daemon that was there a moment ago."""

from __future__ import annotations

from .errors import DenoisedError

# The last one repeats. A daemon that is started again takes some ten seconds until it answers.
PAUSES = (0.1, 0.5, 1.0, 2.0, 4.0)
TOTAL_SECONDS = 60.0
# What a daemon has to tell that the time of a generation is up, before the call itself ends.
ANSWER_SECONDS = 1.0


class Patience:
    """Pauses between tries, longer and longer, until they add up to too much; anew after each success."""

    def __init__(self, total: float = TOTAL_SECONDS) -> None:
        self._total = total
        self._tries = 0
        self._waited = 0.0

    def renew(self) -> None:
        """Something arrived."""
        self._tries, self._waited = 0, 0.0

    def pause(self, error: DenoisedError) -> float:
        """Seconds to wait before the next try, at least what the daemon asked for. Raises the error when it is over."""
        pause = max(PAUSES[min(self._tries, len(PAUSES) - 1)], error.retry_after or 0.0)
        self._tries += 1
        self._waited += pause
        if self._waited > self._total:
            raise error
        return pause

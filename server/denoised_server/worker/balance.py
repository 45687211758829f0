"""Whether the books agree with the allocator: what is in use on a device beside the weights that are booked."""

from __future__ import annotations

# What may be in no book: this share of the weights, and so many bytes. Libraries keep tables for themselves, and the
# first run of a kind prepares things.
SHARE, ALLOWANCE_BYTES = 0.02, 64 * 2**20
# A difference is believed when it lasts: garbage is collected in its own time. Seconds.
PATIENCE = 10.0


class Balance:
    """`base_bytes` were in use before there were any weights."""

    def __init__(self, base_bytes: int) -> None:
        self._base = base_bytes
        self.unaccounted_bytes = 0
        self.working_set_bytes = 0
        self._off_since: float | None = None
        self._is_known = False

    def strike(self, allocated: int, booked: int, *, is_idle: bool, now: float) -> bool:
        """Compares; says whether there is a difference that is too large, lasts, and was not told of before.

        While nothing runs and nothing loads, what is in no book is unaccounted; otherwise calls work in it.
        """
        beside = allocated - self._base - booked
        if not is_idle:
            self.working_set_bytes = max(0, beside - self.unaccounted_bytes)
            self._off_since = None
            return False
        self.unaccounted_bytes, self.working_set_bytes = beside, 0
        if abs(beside) <= ALLOWANCE_BYTES + SHARE * booked:
            self._off_since, self._is_known = None, False
            return False
        self._off_since = now if self._off_since is None else self._off_since
        is_news = not self._is_known and now - self._off_since >= PATIENCE
        self._is_known = self._is_known or is_news
        return is_news

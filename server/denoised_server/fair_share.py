"""Fair share: whose turn it is, of clients that want more than there is."""

from __future__ import annotations


class FairShare:
    """Start-time fair queueing: each client's requests are spaced on a clock of its own, one tick each.

    A client that was idle starts at the present, so that it neither saves up turns nor pays for those of others: one
    that sends a hundred requests waits behind the first one of a client that sends a single one.
    """

    def __init__(self) -> None:
        self._now = 0
        self._next: dict[str, int] = {}

    def start(self, client: str) -> int:
        """The tick at which a new request of the client is due; lower goes first."""
        tick = self.due(client)
        self._next[client] = tick + 1
        return tick

    def due(self, client: str) -> int:
        """The tick at which the next request of the client would be due."""
        return max(self._now, self._next.get(client, 0))

    def serve(self, tick: int) -> None:
        """Moves the present to a request that is being served. Clients that are not ahead of it are forgotten."""
        self._now = max(self._now, tick)
        self._next = {client: due for client, due in self._next.items() if due > self._now}

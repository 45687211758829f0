"""Device seconds, shared: who is behind, and by how much.

Clients get even shares, and each client's requests get even shares of its own. What counts is measured time on the
device, not the number of requests or steps. Who comes late starts level with whoever is farthest behind: idle time is
not saved up, and leaving and coming back gains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Entrant:
    """A request, as far as taking turns goes.

    Higher `priority` goes first. `deadline` is a moment of the engine's clock, in seconds; `remaining` the device
    seconds that it still needs, as far as known, for whoever knows to keep up to date. `used` is its standing here.
    """

    client: str = ""
    priority: int = 0
    deadline: float | None = None
    remaining: float = 0.0
    used: float = 0.0


@dataclass(slots=True, eq=False)
class _Client:
    used: float = 0.0
    entrants: set[Entrant] = field(default_factory=set)


class Fairness:
    """Who has used how much, of those that are busy and of those that were just now."""

    def __init__(self) -> None:
        self._clients: dict[str, _Client] = {}

    def enter(self, entrant: Entrant) -> None:
        client = self._clients.setdefault(entrant.client, _Client())
        if client.entrants:
            entrant.used = min(other.used for other in client.entrants)
        else:
            client.used = max(client.used, self._floor())
        client.entrants.add(entrant)

    def leave(self, entrant: Entrant) -> None:
        self._clients[entrant.client].entrants.discard(entrant)
        floor, busy = self._floor(), any(client.entrants for client in self._clients.values())
        # Nothing is left to say of a client that was idle until the others caught up.
        self._clients = {
            name: client for name, client in self._clients.items() if busy and (client.entrants or client.used > floor)
        }

    def charge(self, entrant: Entrant, seconds: float) -> None:
        entrant.used += seconds
        self._clients[entrant.client].used += seconds

    def standing(self, entrant: Entrant, cost: float) -> tuple[float, float]:
        """Sorts entrants: the client that has used the least goes first, and of its requests the one that has.

        A request counts as if a call of that cost had run: of two that are level, the cheaper call goes first.
        """
        return self._clients[entrant.client].used, entrant.used + cost

    def _floor(self) -> float:
        return min((client.used for client in self._clients.values() if client.entrants), default=0.0)

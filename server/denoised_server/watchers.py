"""Who watches the pipelines, and what each has not been told yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from .callers import Caller
from .channel import Channel
from .views import PipelineView

# Changes that a watcher may be behind, beyond the pipelines that it is told of at first.
MAX_PENDING = 1_000


class ChangeKind(StrEnum):
    """Kinds of change."""

    ADDED = "added"
    MODIFIED = "modified"
    REMOVED = "removed"
    SYNCED = "synced"


@dataclass(frozen=True, slots=True)
class Change:
    """One change; `pipeline` is None for SYNCED only."""

    kind: ChangeKind
    pipeline: PipelineView | None


class Watchers:
    """Finds out what changed by comparing, so that no change can be forgotten where it is made."""

    def __init__(self) -> None:
        self._known: dict[str, PipelineView] = {}
        self._channels: dict[Channel[Change], Caller] = {}

    def __bool__(self) -> bool:
        return bool(self._channels)

    def subscribe(self, views: Mapping[str, PipelineView], caller: Caller) -> Channel[Change]:
        """A channel with everything that the caller sees, a SYNCED, and from then on what `publish` finds of that."""
        self.publish(views)
        seen = [view for view in views.values() if caller.sees(view.owner, shared=view.shared)]
        channel = Channel[Change](limit=len(seen) + 1 + MAX_PENDING)
        for view in seen:
            channel.put(Change(ChangeKind.ADDED, view))
        channel.put(Change(ChangeKind.SYNCED, None))
        self._channels[channel] = caller
        return channel

    def unsubscribe(self, channel: Channel[Change]) -> None:
        del self._channels[channel]

    def publish(self, views: Mapping[str, PipelineView]) -> None:
        """Tells every watcher how `views` differ from those of the last time."""
        changes = [
            (Change(ChangeKind.REMOVED, view), view)
            for name, view in self._known.items()
            if name not in views or views[name].number != view.number
        ]
        for name, view in views.items():
            known = self._known.get(name)
            # A name may belong to another pipeline by now, and that one to another client.
            if known is None or known.number != view.number:
                changes.append((Change(ChangeKind.ADDED, view), view))
            elif known != view:
                changes.append((Change(ChangeKind.MODIFIED, view), view))
        self._known = dict(views)
        for channel, caller in self._channels.items():
            for change, view in changes:
                if caller.sees(view.owner, shared=view.shared):
                    channel.put(change)

    def end(self, error: Exception) -> None:
        for channel in self._channels:
            channel.end(error)

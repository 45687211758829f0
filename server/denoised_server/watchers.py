"""Who watches the pipelines, and what each has not been told yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

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
        self._channels: list[Channel[Change]] = []

    def __bool__(self) -> bool:
        return bool(self._channels)

    def subscribe(self, views: Mapping[str, PipelineView]) -> Channel[Change]:
        """A channel with everything there is, a SYNCED, and from then on what `publish` finds."""
        self.publish(views)
        channel = Channel[Change](limit=len(views) + 1 + MAX_PENDING)
        for view in views.values():
            channel.put(Change(ChangeKind.ADDED, view))
        channel.put(Change(ChangeKind.SYNCED, None))
        self._channels.append(channel)
        return channel

    def unsubscribe(self, channel: Channel[Change]) -> None:
        self._channels.remove(channel)

    def publish(self, views: Mapping[str, PipelineView]) -> None:
        """Tells every watcher how `views` differ from those of the last time."""
        changes = [Change(ChangeKind.REMOVED, view) for name, view in self._known.items() if name not in views]
        for name, view in views.items():
            known = self._known.get(name)
            if known is None:
                changes.append(Change(ChangeKind.ADDED, view))
            elif known != view:
                changes.append(Change(ChangeKind.MODIFIED, view))
        self._known = dict(views)
        for channel in self._channels:
            for change in changes:
                channel.put(change)

    def end(self, error: Exception) -> None:
        for channel in self._channels:
            channel.end(error)

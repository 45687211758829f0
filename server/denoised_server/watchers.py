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


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Change:
    """One change, the same object for all who hear of it; `pipeline` is None for SYNCED only."""

    kind: ChangeKind
    pipeline: PipelineView | None


class Watchers:
    """Finds out what changed by comparing, so that no change can be forgotten where it is made."""

    def __init__(self) -> None:
        self._known: dict[str, PipelineView] = {}
        # What a newcomer is told; made for the first one, and kept until something changes.
        self._present: list[Change] = []
        self._channels: dict[Channel[Change], Caller] = {}

    def __bool__(self) -> bool:
        return bool(self._channels)

    def subscribe(self, views: Mapping[str, PipelineView], caller: Caller) -> Channel[Change]:
        """A channel with everything that the caller sees, a SYNCED, and from then on what `publish` finds of that."""
        self.publish(views)
        if not self._present:
            self._present = [Change(ChangeKind.ADDED, view) for view in self._known.values()]
            self._present.append(Change(ChangeKind.SYNCED, None))
        seen = [change for change in self._present if _sees(caller, change)]
        channel = Channel[Change](limit=len(seen) + MAX_PENDING)
        for change in seen:
            channel.put(change)
        self._channels[channel] = caller
        return channel

    def unsubscribe(self, channel: Channel[Change]) -> None:
        del self._channels[channel]

    def publish(self, views: Mapping[str, PipelineView]) -> None:
        """Tells every watcher how `views` differ from those of the last time."""
        changes = [
            Change(ChangeKind.REMOVED, view)
            for name, view in self._known.items()
            if name not in views or views[name].number != view.number
        ]
        for name, view in views.items():
            known = self._known.get(name)
            # A name may belong to another pipeline by now, and that one to another client.
            if known is None or known.number != view.number:
                changes.append(Change(ChangeKind.ADDED, view))
            elif known != view:
                changes.append(Change(ChangeKind.MODIFIED, view))
        if not changes:
            return
        self._known, self._present = dict(views), []
        for channel, caller in self._channels.items():
            for change in changes:
                if _sees(caller, change):
                    channel.put(change)

    def end(self, error: Exception) -> None:
        for channel in self._channels:
            channel.end(error)


def _sees(caller: Caller, change: Change) -> bool:
    view = change.pipeline
    return view is None or caller.sees(view.owner, shared=view.shared)

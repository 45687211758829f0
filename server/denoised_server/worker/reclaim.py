"""Whether memory that was let go of is really free: as long as anything refers to a weight, it is not."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef

logger = logging.getLogger(__name__)

# A request that has just ended may still be on another thread's stack. Seconds.
PAUSES = (0.0, 0.01, 0.05, 0.1, 0.2)


class Reclaim:
    """Looks after weights that were let go of until they are gone. May be used from any thread."""

    def __init__(self) -> None:
        self._pending: list[tuple[StorageWeakRef, int]] = []
        self._lock = threading.Lock()

    @property
    def unreclaimed_bytes(self) -> int:
        """What was let go of and is still there."""
        with self._lock:
            self._pending = [(ref, size) for ref, size in self._pending if not ref.expired()]
            return sum(size for _, size in self._pending)

    def settle(self, what: str, let_go: Iterable[tuple[StorageWeakRef, int]]) -> None:
        """Says what holds on to what does not go. Gives a GPU's memory back; the host's is back by itself."""
        left = [(ref, size) for ref, size in let_go if not ref.expired()]
        for pause in PAUSES:
            if not left:
                break
            gc.collect()
            time.sleep(pause)
            left = [(ref, size) for ref, size in left if not ref.expired()]
        if left:
            size = sum(size for _, size in left)
            logger.warning("%d bytes of %s did not come free: %s", size, what, _holders({ref.cdata for ref, _ in left}))
            with self._lock:
                self._pending += left
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _holders(storages: set[int]) -> str:
    """Kinds of objects that refer to tensors of these storages."""
    # By type: asking some objects for their class makes libraries load things.
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    tensors = [each for each in tensors if each.untyped_storage()._cdata in storages]
    kinds = Counter(type(holder).__name__ for each in tensors for holder in gc.get_referrers(each))
    del tensors
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "nothing that Python knows"

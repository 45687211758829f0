"""Possession: weights that are mapped from files become the process's own, while their pipeline is in use already.

A mapped file is there at once, so a load is over when its pages are in memory. But the weights would change with the
file, and the process would end when it is truncated; and many pieces of memory come and go slower than one.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

import torch

from .components import Held

logger = logging.getLogger(__name__)

# How often a component whose weights somebody has in their hands is tried again. Seconds.
RETRY_SECONDS = 0.25
# After which memory that was not there may be. Seconds.
NO_MEMORY_SECONDS = 10.0


class Possession:
    """Takes one component after another, on a thread of its own.

    `may_swap` says whether to begin, which costs a copy; `swap` gives a component its weights in a buffer, or says that
    it has no use for them: it returns False while that cannot be.
    """

    def __init__(self, may_swap: Callable[[Held], bool], swap: Callable[[Held, torch.Tensor], bool]) -> None:
        self._may_swap, self._swap = may_swap, swap
        self._pending: deque[Held] = deque()
        self._changed = threading.Condition(threading.RLock())
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="possession", daemon=True)
        self._thread.start()

    @property
    def is_complete(self) -> bool:
        """Whether nothing is mapped any more."""
        return not self._pending

    def take(self, held: Held) -> None:
        with self._changed:
            self._pending.append(held)
            self._changed.notify_all()

    def drop(self, held: Held) -> None:
        """It is gone, or done."""
        with self._changed:
            if held in self._pending:
                self._pending.remove(held)

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while (held := self._next()) is not None:
            pause = self._try(held)
            with self._changed:
                if not pause:
                    self.drop(held)
                else:
                    if held in self._pending:
                        # The others first.
                        self._pending.rotate(-1)
                    self._changed.wait_for(lambda: self._is_closed, pause)
            # Unloading waits for whoever refers to it.
            del held

    def _next(self) -> Held | None:
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._is_closed)
            return None if self._is_closed else self._pending[0]

    def _try(self, held: Held) -> float:
        """Seconds after which to try again; 0 when it is done."""
        if held.cargo.is_packed:
            return 0.0
        try:
            if not self._may_swap(held):
                return RETRY_SECONDS
            buffer = held.cargo.empty(pinned=False)
            for _ in held.cargo.fill(buffer):
                if self._is_closed or held not in self._pending:
                    return 0.0
            return 0.0 if self._swap(held, buffer) else RETRY_SECONDS
        except MemoryError as error:
            logger.warning("weights stay mapped from their files for want of memory: %s", error)
            return NO_MEMORY_SECONDS
        except Exception:
            # The others are still to be taken.
            logger.exception("weights could not be copied out of their files, which should not happen")
            return 0.0

"""The real worker, where nothing stays on the device: after each batch everything leaves it that can."""

from __future__ import annotations

from typing import Any

from denoised_server.messages import WorkerSettings
from denoised_server.worker.worker import Worker
from torch import nn

NAME = "tests.parity.restless:RestlessWorker"


class RestlessWorker(Worker):
    """What the next calls need is brought back for them, from its files."""

    def __init__(self, settings: WorkerSettings) -> None:
        super().__init__(settings)
        engine, nobody = self._engine, nn.Identity()
        run_batch = engine._run_batch

        def run_and_leave(batch: Any) -> None:
            run_batch(batch)
            self._residency.offload(nobody)

        engine._run_batch = run_and_leave  # type: ignore[method-assign]

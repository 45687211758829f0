"""The real worker, which has a fault when a signal says so: its next forward fails, or memory is lost."""

from __future__ import annotations

import signal
from typing import Any

import torch
from denoised_server.messages import WorkerSettings
from denoised_server.worker.worker import Worker

NAME = "tests.faults.faulty:FaultyWorker"
# Which signal arms which error.
EXCEPTION, ALLOCATION = signal.SIGUSR1, signal.SIGUSR2
LEAKY = "tests.faults.faulty:LeakyWorker"
LEAKING, LEAK = signal.SIGUSR1, 256 << 20


class FaultyWorker(Worker):
    def __init__(self, settings: WorkerSettings) -> None:
        super().__init__(settings)
        armed: list[Exception] = []

        def fail(*_: Any) -> None:
            if armed:
                raise armed.pop()

        # Of every module there is, so also of whatever runs next.
        torch.nn.modules.module.register_module_forward_pre_hook(fail)
        signal.signal(EXCEPTION, lambda *_: armed.append(ArithmeticError("injected")))
        signal.signal(ALLOCATION, lambda *_: armed.append(torch.OutOfMemoryError("injected")))


class LeakyWorker(Worker):
    """Loses LEAK bytes, each time that a signal says so."""

    def __init__(self, settings: WorkerSettings) -> None:
        super().__init__(settings)
        lost: list[torch.Tensor] = []
        signal.signal(LEAKING, lambda *_: lost.append(torch.ones(LEAK, dtype=torch.uint8)))

"""A worker that says what is alive in it: the real one, asked by a signal."""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from denoised_server.messages import WorkerSettings
from denoised_server.worker.worker import Worker
from greenlet import greenlet

NAME = "tests.soak.counted:CountedWorker"


class CountedWorker(Worker):
    """Writes its counts to a file in the state directory on SIGUSR1."""

    def __init__(self, settings: WorkerSettings) -> None:
        super().__init__(settings)
        self._file = _file(Path(settings.state_dir), os.getpid())
        signal.signal(signal.SIGUSR1, self._count)

    def _count(self, *_: Any) -> None:
        gc.collect()
        objects = gc.get_objects()
        counts = {
            "greenlets": sum(isinstance(one, greenlet) and not one.dead for one in objects),
            "tensors": sum(isinstance(one, torch.Tensor) for one in objects),
            "python_threads": threading.active_count(),
        }
        # In one piece: who waits for the file reads it at once.
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps(counts))
        part.rename(self._file)


def ask(state_dir: Path, process: psutil.Process) -> dict[str, int]:
    """What is alive in a worker at this moment."""
    file = _file(state_dir, process.pid)
    file.unlink(missing_ok=True)
    process.send_signal(signal.SIGUSR1)
    while not file.exists():
        time.sleep(0.05)
    counts: dict[str, int] = json.loads(file.read_text())
    return counts


def _file(state_dir: Path, pid: int) -> Path:
    return state_dir / f"counts-{pid}.json"

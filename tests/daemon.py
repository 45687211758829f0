"""A daemon as users run it: `denoised serve` in a process of its own, on free ports."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

import psutil
from denoised import Client
from prometheus_client.parser import text_string_to_metric_families

READY = re.compile(r"denoised ready on (\S+), metrics on (\S+)")


def _read(stream: TextIO, take: Callable[[str], object]) -> None:
    with stream:
        for line in stream:
            take(line)


# `denoised serve`, whose workers run the class that its first argument names.
OTHER_WORKER = """
import functools, sys
from denoised.cli import app
from denoised_server import server

server.main = functools.partial(server.main, worker=sys.argv.pop(1))
app(prog_name="denoised")
"""


class Daemon:
    """Started by making one; use it with `with`. `worker` is another class for its workers than the real one;
    `variables` are added to its environment.
    """

    def __init__(
        self,
        state_dir: Path,
        *options: str,
        allow: Iterable[Path] = (),
        threads: int = 1,
        worker: str = "",
        **variables: str,
    ) -> None:
        program = ["-c", OTHER_WORKER, worker] if worker else ["-m", "denoised"]
        command = [sys.executable, *program, "serve", "--state-dir", str(state_dir), "--device", "cpu"]
        command += ["--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0", "--threads", str(threads)]
        for folder in allow:
            command += ["--allow-dir", str(folder)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DENOISED_")}
        self.process = subprocess.Popen(
            [*command, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"HF_HUB_OFFLINE": "1"} | variables,
        )
        self.log: list[str] = []
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        # The pipes have to be read to their ends, or the daemon would wait for us.
        self._readers = [
            threading.Thread(target=_read, args=(self.process.stdout, lines.put)),
            threading.Thread(target=_read, args=(self.process.stderr, self.log.append)),
        ]
        for reader in self._readers:
            reader.start()
        try:
            found = READY.search(lines.get(timeout=60))
        except queue.Empty:
            found = None
        if found is None:
            self.process.kill()
            raise RuntimeError("the daemon did not start:\n" + "".join(self.log))
        self.target, self.metrics_url = found[1], found[2]

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def client(self, **options: Any) -> Client:
        given: dict[str, Any] = {"progress_bar": False, "timeout": 60.0}
        return Client(self.target, **given | options)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            for reader in self._readers:
                reader.join(10)

    def workers(self) -> list[psutil.Process]:
        """The worker processes, by their own word."""
        with self.client() as client:
            return [psutil.Process(worker.pid) for worker in client.workers()]

    def metrics(self) -> dict[str, float]:
        """Samples as "name{label=value}", labels in order."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as response:
            text = response.read().decode()
        samples = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
                samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return samples

    def metric(self, name: str) -> float:
        """Sum over the labels of a metric."""
        return sum(value for key, value in self.metrics().items() if key.partition("{")[0] == name)

    def metric_of(self, name: str, **labels: str) -> float:
        """Sum over those series of a metric that have these labels."""
        wanted = {f"{key}={value}" for key, value in labels.items()}
        return sum(
            value
            for key, value in self.metrics().items()
            if key.partition("{")[0] == name and wanted <= set(key.partition("{")[2].rstrip("}").split(","))
        )

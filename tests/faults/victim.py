"""A daemon in a process of its own that can be killed and started again: same port, same state directory."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import psutil
from denoised import Client

TOY = "tests.contract.toy_worker:ToyWorker"
PROGRAM = """
import sys
from denoised_server.server import main
if __name__ == "__main__":
    settings = dict(argument.split("=", 1) for argument in sys.argv[2:])
    sys.exit(main(settings, config_file=None, print_config=False, verbose=False, worker=sys.argv[1]))
"""
READY = re.compile(r"denoised ready on (\S+), metrics on (\S+)")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


class Victim:
    """`worker` names the class that its workers run; settings are the daemon's, `variables` its environment's."""

    def __init__(
        self, state_dir: Path, *, worker: str = TOY, variables: Mapping[str, str] | None = None, **settings: object
    ) -> None:
        self.state_dir = state_dir
        self._variables = dict(variables or {})
        self.target = f"127.0.0.1:{free_port()}"
        self.metrics = f"127.0.0.1:{free_port()}"
        given = {"device": "cpu", "threads": 1, "address": self.target, "metrics_address": self.metrics}
        given |= {"state_dir": state_dir} | settings
        self._command = [sys.executable, "-c", PROGRAM, worker, *(f"{name}={value}" for name, value in given.items())]
        self._reader: threading.Thread | None = None
        self.log: list[str] = []
        self.process: subprocess.Popen[str]

    def __enter__(self) -> Victim:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def launch(self) -> None:
        """Starts it and returns at once."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith("DENOISED_")}
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables | self._variables
        )
        assert self.process.stderr
        # Read, so that the daemon never has to wait for us.
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,), daemon=True)
        self._reader.start()

    def start(self) -> None:
        """Starts it and returns when it is ready."""
        self.launch()
        assert self.process.stdout
        line = self.process.stdout.readline()
        if READY.search(line) is None:
            self.kill()
            raise RuntimeError("the daemon did not start:\n" + "".join(self.log[-30:]))

    def kill(self) -> None:
        """kill -9, if it still runs."""
        self.process.kill()
        self.wait()

    def wait(self, seconds: float = 60) -> int:
        """Returns the exit code once it is gone."""
        code = self.process.wait(seconds)
        if self._reader is not None:
            self._reader.join(10)
        if self.process.stdout:
            self.process.stdout.close()
        return code

    def client(self, **options: Any) -> Client:
        given: dict[str, Any] = {"progress_bar": False, "timeout": 60.0}
        return Client(self.target, **given | options)

    def workers(self) -> list[psutil.Process]:
        with self.client() as client:
            return [psutil.Process(worker.pid) for worker in client.workers() if worker.pid]

    def _read(self, stream: TextIO) -> None:
        with stream:
            for line in stream:
                self.log.append(line)

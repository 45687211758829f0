"""Programs of other ecosystems that tests run where they are there; `deploy/tools.sh` puts them into .tools/bin."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATH = f"{ROOT / '.tools' / 'bin'}:{os.environ['PATH']}"


def needs(*programs: str, target: str) -> pytest.MarkDecorator:
    """Skips where one of them is missing, and says which target installs it."""
    missing = [program for program in programs if shutil.which(program, path=PATH) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed; `make {target}` does it")


def run(*command: str | Path, folder: Path = ROOT, timeout: float = 120, **variables: str) -> str:
    """What the program printed; fails with what it said when it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=os.environ | {"PATH": PATH} | variables,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def start(command: Sequence[str | Path], log: Path, **variables: str) -> subprocess.Popen[bytes]:
    """A program that goes on; what it prints is in the file."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [str(part) for part in command],
            env=os.environ | {"PATH": PATH} | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until(predicate: Callable[[], bool], timeout: float = 30) -> None:
    end = time.monotonic() + timeout
    while not predicate():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.1)

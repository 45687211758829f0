"""What all tests share: one compute thread, and checkpoints that are built once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.daemon import Daemon

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory under which every checkpoint of the session lies."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def sd_checkpoint(checkpoint_dir: Path) -> Path:
    from tests import checkpoints

    return checkpoints.stable_diffusion(checkpoint_dir / "sd")


@pytest.fixture(scope="session")
def sdxl_checkpoint(checkpoint_dir: Path) -> Path:
    from tests import checkpoints

    return checkpoints.stable_diffusion_xl(checkpoint_dir / "sdxl")


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory, checkpoint_dir: Path) -> Iterator[Daemon]:
    """A daemon that tests share; those that harm theirs start one of their own.

    With DENOISED_EVICT=1 everything leaves its device all the time.
    """
    from tests.daemon import Daemon

    worker = "tests.parity.restless:RestlessWorker" if os.environ.get("DENOISED_EVICT") else ""
    with Daemon(tmp_path_factory.mktemp("state"), allow=[checkpoint_dir], worker=worker) as running:
        yield running


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of families and tasks, where its suite has run."""
    ran = [
        (report.nodeid.partition("::")[2], kind)
        for kind in ("passed", "failed")
        for report in terminalreporter.stats.get(kind, [])
        if report.nodeid.startswith("tests/parity/test_families.py")
    ]
    if ran:
        from tests.parity import table

        terminalreporter.section("families and tasks")
        for line in table.outcome(ran):
            terminalreporter.line(line)

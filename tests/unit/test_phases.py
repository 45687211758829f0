"""Phases of generations, as a real worker tells them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from denoised_server.messages import Finished, Generate, PhaseBegan, Progress

from tests.unit.worker_driver import Driver

ARGUMENTS: dict[str, Any] = {"prompt": "a cat", "height": 64, "width": 64, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def driver(checkpoint_dir: Path, sd_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    driver = Driver(checkpoint_dir, tmp_path_factory.mktemp("worker"))
    driver.load("pipelines/a", sd_checkpoint)
    yield driver
    driver.close()


def told(driver: Driver, side: int = 0, **command: Any) -> list[Progress | PhaseBegan]:
    arguments = ARGUMENTS | ({"height": side, "width": side} if side else {})
    events = driver.start(Generate("pipelines/a", arguments, seeds=(1,), **command)).result()
    return [event for event in events if isinstance(event, Progress | PhaseBegan)]


def test_each_phase_is_told_as_it_begins(driver: Driver) -> None:
    assert told(driver) == [
        PhaseBegan("text_encode", 0),
        PhaseBegan("denoise", 0),
        Progress(1, 3),
        Progress(2, 3),
        Progress(3, 3),
        PhaseBegan("decode", 3),
    ]
    # What takes less than telling of it is not told.
    assert told(driver, side=256)[-1] == PhaseBegan("encode", 3)


def test_who_wants_to_hear_little_hears_nothing_of_what_is_over_before(driver: Driver) -> None:
    assert told(driver, progress_interval=60.0) == []


def test_the_end_says_how_long_each_phase_took_and_how_large_the_batches_were(driver: Driver) -> None:
    finished = driver.start(Generate("pipelines/a", ARGUMENTS, seeds=(1,))).result()[-1]
    assert isinstance(finished, Finished)
    assert list(finished.phase_seconds()) == ["text_encode", "denoise", "decode", "encode"]
    assert all(seconds > 0 for seconds in finished.phase_seconds().values())
    assert finished.batch_sizes == ((1, finished.calls),)

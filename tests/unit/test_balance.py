"""Books against the allocator."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from denoised_server.worker.balance import ALLOWANCE_BYTES, PATIENCE, Balance
from denoised_server.worker.device_memory import DeviceMemory

from tests.unit.worker_driver import Driver

BASE, WEIGHTS = 1_000, 2**30
MUCH = 2 * ALLOWANCE_BYTES


def test_what_is_in_no_book_is_unaccounted_while_nothing_runs() -> None:
    balance = Balance(BASE)
    balance.strike(BASE + WEIGHTS + 5, WEIGHTS, is_idle=True, now=0.0)
    assert (balance.unaccounted_bytes, balance.working_set_bytes) == (5, 0)
    balance.strike(BASE + WEIGHTS + 105, WEIGHTS, is_idle=False, now=1.0)
    assert (balance.unaccounted_bytes, balance.working_set_bytes) == (5, 100)


def test_a_difference_that_lasts_is_told_once() -> None:
    balance = Balance(BASE)

    def strike(beside: int, now: float, *, is_idle: bool = True) -> bool:
        return balance.strike(BASE + WEIGHTS + beside, WEIGHTS, is_idle=is_idle, now=now)

    assert [strike(MUCH, now) for now in (0.0, PATIENCE - 1, PATIENCE, PATIENCE + 1)] == [False, False, True, False]
    assert not strike(0, 100.0)
    assert not strike(MUCH, 101.0)
    assert not strike(MUCH, 105.0, is_idle=False)
    assert not strike(MUCH, 112.0), "it has not lasted: something ran in between"
    assert strike(MUCH, 122.0)


def test_books_with_more_than_there_is_are_a_difference_too() -> None:
    balance = Balance(BASE)
    assert not balance.strike(BASE, MUCH, is_idle=True, now=0.0)
    assert balance.strike(BASE, MUCH, is_idle=True, now=PATIENCE)
    assert balance.unaccounted_bytes == -MUCH


def test_the_allocator_knows_tensors_to_within_a_hundredth() -> None:
    memory = DeviceMemory(torch.device("cpu"))
    gc.collect()
    before = memory.allocated_bytes
    tensor = torch.zeros(2**25)
    assert abs(memory.allocated_bytes - before - tensor.nbytes) < tensor.nbytes / 100
    del tensor
    assert abs(memory.allocated_bytes - before) < 2**20
    assert memory.total_bytes > memory.free_bytes > 0


def test_a_worker_finds_what_is_in_no_book(checkpoint_dir: Path, sd_checkpoint: Path) -> None:
    driver = Driver(checkpoint_dir)
    try:
        driver.load("pipelines/a", sd_checkpoint)
        gc.collect()
        before = driver.snapshot().memory.unaccounted_bytes
        leaked = torch.zeros(2**25)
        after = driver.snapshot().memory.unaccounted_bytes
        assert abs(after - before - leaked.nbytes) < leaked.nbytes / 20
    finally:
        driver.close()

"""Devices, on a machine that is described by a folder and environment variables."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from denoised_server import devices
from denoised_server.config import SettingsError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], None]:
    """Sets the number of GPUs that the machine has."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "NVIDIA_FOLDER", tmp_path)
    monkeypatch.setattr(devices, "_smi", lambda *arguments: ["16384"])

    def put(count: int) -> None:
        for index in range(count):
            (tmp_path / str(index)).mkdir()

    return put


@pytest.mark.parametrize(
    ("count", "device", "workers", "resolved"),
    [
        (0, "auto", None, ["cpu"]),
        (0, "auto", 2, ["cpu", "cpu"]),
        (2, "auto", None, ["cuda:0", "cuda:1"]),
        (2, "cpu", 3, ["cpu", "cpu", "cpu"]),
        (2, "cuda", None, ["cuda:0", "cuda:1"]),
        (2, "cuda:1", None, ["cuda:1"]),
    ],
)
def test_each_worker_has_a_device(
    gpus: Callable[[int], None], count: int, device: str, workers: int | None, resolved: list[str]
) -> None:
    gpus(count)
    assert devices.resolve(device, workers) == resolved


@pytest.mark.parametrize(
    ("count", "device", "workers", "text"),
    [
        (0, "cuda", None, "no NVIDIA GPU"),
        (1, "cuda:1", None, "no cuda:1"),
        (1, "cuda", 2, "workers is for the CPU"),
        (1, "auto", 2, "workers is for the CPU"),
        (1, "gpu", None, "'gpu' is no device"),
        (1, "cuda:x", None, "is no device"),
    ],
)
def test_a_device_that_is_not_there_is_one_sentence(
    gpus: Callable[[int], None], count: int, device: str, workers: int | None, text: str
) -> None:
    gpus(count)
    with pytest.raises(SettingsError, match=text):
        devices.resolve(device, workers)


@pytest.mark.parametrize(("visible", "count"), [("0", 1), ("0,2", 2), ("", 0), ("-1", 0), ("1,-1,2", 1), ("GPU-a", 1)])
def test_hidden_gpus_do_not_count(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, visible: str, count: int
) -> None:
    gpus(4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.count_gpus() == count


def test_threads_are_shared_between_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    assert devices.threads_each(["cpu"] * 3, None) == 2
    assert devices.threads_each(["cpu"] * 16, None) == 1
    assert devices.threads_each(["cpu"], 5) == 5


def test_a_budget_is_bytes_or_a_share_of_the_device() -> None:
    assert devices.budget_each(123, ["cuda:0"]) == 123
    assert devices.budget_each(0.5, ["cuda:0", "cuda:1"]) == 0.5
    assert devices.budget_each(0.5, ["cpu", "cpu"]) == 0.25
    assert devices.part_each(["cpu"] * 4) == 0.25
    assert devices.part_each(["cuda:0", "cuda:1"]) == 1

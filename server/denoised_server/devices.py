"""Devices: which workers a machine is to have. Looks without torch, which the front-end does not import."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .config import SettingsError

NVIDIA_FOLDER = Path("/proc/driver/nvidia/gpus")
SMI_SECONDS = 20
# The rest is for files in the page cache, and for the processes.
AUTO_HOST_SHARE = 0.5


def resolve(device: str, workers: int | None) -> list[str]:
    """One torch device name for each worker, from the settings `device` and `workers`."""
    if device == "auto":
        device = "cuda" if count_gpus() else "cpu"
    if device == "cpu":
        return ["cpu"] * (workers or 1)
    if workers is not None:
        raise SettingsError(f"workers is for the CPU: {device} has one worker for each GPU. Leave it out.")
    if found := re.fullmatch(r"cuda:(\d+)", device):
        if (count := count_gpus()) <= int(found[1]):
            raise SettingsError(f"There is no {device}: this machine shows {count} NVIDIA GPUs.")
        return [device]
    if device == "cuda":
        if not (count := count_gpus()):
            raise SettingsError("There is no NVIDIA GPU to be seen. Use --device cpu, or check the driver.")
        return [f"cuda:{index}" for index in range(count)]
    raise SettingsError(f"{device!r} is no device. Use auto, cpu, cuda or cuda:N.")


def count_gpus() -> int:
    """NVIDIA GPUs that a process started from here sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = _count_present()
    if visible is None or not present:
        return present
    # CUDA itself stops reading at the first entry it does not know; "-1" hides all.
    names = [name.strip() for name in visible.split(",")]
    cut = next((index for index, name in enumerate(names) if name in ("", "-1")), len(names))
    return len(names[:cut])


def threads_each(workers: Sequence[str], threads: int | None) -> int:
    """Compute threads of each worker: the setting, or a fair share of the cores."""
    return threads or max(1, len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0]) // len(workers))


def part_each(workers: Sequence[str]) -> float:
    """Share of its device's memory that each worker has: workers on the CPU divide it."""
    return 1 / len(workers) if workers[0] == "cpu" else 1.0


def budget_each(setting: int | float, workers: Sequence[str]) -> int | float:
    """Bytes for each worker as the setting says, or a share of its device's memory, of which it has a part."""
    return setting if isinstance(setting, int) else setting * part_each(workers)


def host_each(setting: int | float | str, workers: Sequence[str]) -> int | float:
    """What weights beside each device may take of the host's memory: bytes, or a share of what the host has."""
    if isinstance(setting, str):
        setting = AUTO_HOST_SHARE if workers[0] != "cpu" else 0
    return setting / len(workers) if isinstance(setting, float) else setting


def _count_present() -> int:
    if NVIDIA_FOLDER.is_dir():
        return len(list(NVIDIA_FOLDER.iterdir()))
    return len([line for line in _smi("-L") if line.startswith("GPU ")])


def _smi(*arguments: str) -> list[str]:
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=SMI_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()

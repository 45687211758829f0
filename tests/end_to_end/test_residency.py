"""More pipelines than the device has room for, behind a real daemon."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from denoised import Client
from denoised.errors import NoRoomError
from denoised.v1 import pipeline_service_pb2 as pb
from diffusers import AutoPipelineForText2Image

from tests import checkpoints
from tests.daemon import Daemon

SIZE: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}


@pytest.fixture(scope="module")
def folders(checkpoint_dir: Path, sd_checkpoint: Path, sdxl_checkpoint: Path) -> list[Path]:
    """Four pipelines of two families; three share all but their UNets."""
    others = [checkpoints.stable_diffusion(checkpoint_dir / f"tuned-{seed}", seed=seed) for seed in (21, 22)]
    return [sd_checkpoint, *others, sdxl_checkpoint]


@pytest.fixture(scope="module")
def client(folders: list[Path], tmp_path_factory: pytest.TempPathFactory, checkpoint_dir: Path) -> Iterator[Client]:
    """A daemon with room for about a third of them."""
    state = tmp_path_factory.mktemp("small")
    config = state / "denoised.toml"
    config.write_text('memory_budget = "5MiB"\n')
    with Daemon(state, "--config", str(config), allow=[checkpoint_dir]) as daemon, daemon.client() as client:
        yield client


def until(predicate: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not predicate():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_more_weights_than_room_run_without_a_failure_and_draw_the_same_bits(
    client: Client, folders: list[Path]
) -> None:
    worker = client.workers()[0]
    before = psutil.Process(worker.pid).memory_info().rss
    pipes = [client.load(folder, task="text-to-image") for folder in folders]
    parts = {part.digest: part.weight_bytes for pipe in pipes for part in pipe.info.components if part.digest}
    assert sum(parts.values()) > 2 * worker.memory.budget_bytes
    order = random.Random(5).choices(range(4), [4, 2, 1, 1], k=24)
    with ThreadPoolExecutor(3) as callers:
        drawn = list(
            callers.map(lambda index: pipes[index]("red apple", seed=index, batching="forbid", **SIZE).images, order)
        )
    memory = client.workers()[0].memory
    assert memory.weight_bytes <= memory.budget_bytes
    for index in range(4):
        local = AutoPipelineForText2Image.from_pretrained(folders[index])
        local.set_progress_bar_config(disable=True)
        expected = local("red apple", generator=torch.Generator().manual_seed(index), **SIZE).images
        for number, images in zip(order, drawn, strict=True):
            if number == index:
                np.testing.assert_array_equal(images, expected)
    for pipe in pipes:
        pipe.unload()
    assert client.workers()[0].memory.weight_bytes == 0
    # What the first run of each kind prepares stays; weights that stayed would be more.
    assert psutil.Process(worker.pid).memory_info().rss - before < 0.5 * before


def test_a_pipeline_leaves_after_its_keep_alive_and_its_handle_stays(client: Client, folders: list[Path]) -> None:
    with client.load(folders[0], task="text-to-image", keep_alive=0) as pipe:
        first = pipe("red apple", seed=1, **SIZE).images
        until(lambda: client.workers()[0].memory.weight_bytes < 100_000)
        until(lambda: pipe.refresh().info.residency == pb.RESIDENCY_DISK)
        np.testing.assert_array_equal(pipe("red apple", seed=1, **SIZE).images, first)
        assert not pipe.renew(keep_alive=-1).info.HasField("keep_alive")


def test_a_pinned_pipeline_stays(client: Client, folders: list[Path]) -> None:
    with client.load(folders[0], task="text-to-image", pinned=True) as pinned:
        assert pinned.info.pinned
        with pytest.raises(NoRoomError):
            client.load(folders[1], task="text-to-image")
        pinned.renew(pinned=False)
        with client.load(folders[1], task="text-to-image") as other:
            other("red apple", **SIZE)

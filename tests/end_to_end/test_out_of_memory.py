"""A daemon whose worker may take no more memory: the kernel refuses it, callers see what that means for them."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from denoised import AutoPipelineForText2Image, errors

from tests.daemon import Daemon

MIB = 1 << 20
SMALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 4, "height": 64, "width": 64, "output_type": "np"}
LARGE = SMALL | {"num_inference_steps": 1, "height": 512, "width": 512}


@pytest.fixture(scope="module")
def strained(tmp_path_factory: pytest.TempPathFactory, checkpoint_dir: Path) -> Iterator[Daemon]:
    # What is freed goes back at once: otherwise what is served from it would need no new memory.
    given: dict[str, Any] = {"MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_TRIM_THRESHOLD_": str(MIB)}
    with Daemon(tmp_path_factory.mktemp("state"), allow=[checkpoint_dir], **given) as running:
        yield running


@contextmanager
def limited(worker: psutil.Process, extra_bytes: int) -> Iterator[None]:
    """Within it, the worker may have so many bytes more than it has."""
    worker.rlimit(psutil.RLIMIT_DATA, (worker.memory_info().data + extra_bytes, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        worker.rlimit(psutil.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_request_too_large_for_the_memory_comes_through_in_tiles_or_fails_alone(
    strained: Daemon, sd_checkpoint: Path
) -> None:
    with strained.client() as client, ThreadPoolExecutor(4) as others:
        pipe = AutoPipelineForText2Image.from_pretrained(sd_checkpoint, client=client)
        expected = [pipe(**SMALL, seed=seed, batching="forbid").images for seed in range(3)]
        whole = pipe(**LARGE, seed=1, batching="forbid").images
        (worker,) = strained.workers()
        with limited(worker, 48 * MIB):
            running = [others.submit(pipe, **SMALL, seed=seed) for seed in range(3)]
            with pytest.raises(errors.DeviceOutOfMemoryError) as failed:
                pipe(**LARGE, seed=1, batching="forbid")
            tiled = pipe(**LARGE, seed=1)
            for each, picture in zip(running, expected, strict=True):
                np.testing.assert_allclose(each.result().images, picture, atol=1e-3)
        assert failed.value.code == "RESOURCE_EXHAUSTED"
        assert int(failed.value.metadata["needed_bytes"]) >= 16 * MIB
        assert failed.value.metadata["method"] == "AutoencoderKL.decode"
        assert tiled.timings.recoveries == ("tile",)
        assert tiled.images.shape == whole.shape
        assert np.abs(tiled.images - whole).mean() < 0.1
        # Nothing of it stays: neither the tiles nor the worker's trouble.
        again = pipe(**LARGE, seed=1, batching="forbid")
        np.testing.assert_array_equal(again.images, whole)
        assert again.timings.recoveries == ()
        assert strained.metric_of("denoised_out_of_memory_total", rung="tile") == 1
        assert strained.metric_of("denoised_out_of_memory_total", rung="none") == 1
        assert strained.metric("denoised_worker_restarts_total") == 0

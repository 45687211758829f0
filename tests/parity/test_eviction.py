"""Some families where every component leaves the device between its calls: the bits are the same.

`make evict` runs the whole suite that way.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.daemon import Daemon

from . import restless
from .checkpoints import FAMILIES
from .checkpoints.family import Family
from .pair import Pairs, numbers

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")
FEW = [family for family in FAMILIES if str(family) in ("stable-diffusion-xl", "flux", "kandinsky")]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, checkpoint_dir: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("restless"), allow=[checkpoint_dir], worker=restless.NAME) as running:
        yield running


@pytest.fixture(scope="module")
def pairs(daemon: Daemon, checkpoint_dir: Path) -> Iterator[Pairs]:
    with daemon.client() as client, Pairs(client, checkpoint_dir / "restless") as pairs:
        yield pairs


def evictions(daemon: Daemon) -> float:
    return daemon.metric_of("denoised_evictions_total", tier="device")


@pytest.mark.parametrize("family", FEW, ids=str)
def test_bits_are_the_same_where_every_component_leaves_between_its_calls(
    daemon: Daemon, pairs: Pairs, family: Family
) -> None:
    pair = pairs.of(family)
    for task in family.mapped():
        before = evictions(daemon)
        result = pair.there(task, batching="forbid")
        # What reads the prompt, what denoises and what decodes have each left at least once.
        end = time.monotonic() + 10
        while evictions(daemon) < before + 3:
            assert time.monotonic() < end, "everything stayed"
            time.sleep(0.1)
        for name, value in pair.here(task).items():
            np.testing.assert_equal(numbers(result[name]), numbers(value))

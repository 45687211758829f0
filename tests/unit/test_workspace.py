"""What calls work in, measured on real calls, and what follows from it for the batches that are joined."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from denoised_server.worker import joining
from denoised_server.worker.batches import Batches, Call, Costs
from denoised_server.worker.device_memory import DeviceMemory
from denoised_server.worker.ledger import Ledger
from denoised_server.worker.memory_counts import MemoryCounts
from denoised_server.worker.meter import Meter
from denoised_server.worker.overlay import Overlay
from denoised_server.worker.recovery import Recovery
from denoised_server.worker.seam import Method
from denoised_server.worker.workspace import Workspace
from torch import nn

CPU = torch.device("cpu")
MIB = 1 << 20
SAMPLE = torch.ones(1, 2)


class Pantry:
    """Notes what it is asked for, and has nothing to give."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str]] = []

    def evict_idle(self, needed_bytes: int, reason: str = "out_of_memory") -> int:
        self.asked.append((needed_bytes, reason))
        return 0

    def offload(self, keep: nn.Module) -> int:
        return 0


class Bench:
    """Batches on a device whose calls may take so much."""

    def __init__(self, room: int) -> None:
        self.counts, self.pantry, self.ledger = MemoryCounts(), Pantry(), Ledger(0, room)
        workspace = Workspace(CPU, self.ledger, DeviceMemory(CPU), self.pantry, self.counts)
        self.batches = Batches(Recovery(CPU, counts=self.counts, room=self.pantry, workspace=workspace))
        self.booked: list[int] = []
        self.method = Method(nn.Identity(), "forward", self._compute, joining.parameters(self._compute))

    def _compute(self, sample: torch.Tensor) -> torch.Tensor:
        """Takes 32 MiB for each sample."""
        self.booked.append(self.ledger.claimed_bytes)
        scratch = torch.empty(sample.shape[0] * 32 * MIB, dtype=torch.uint8)
        return sample + min(scratch.nbytes, 0)

    def run(self, count: int) -> int:
        """How many of so many calls ran."""
        calls = [
            Call(
                self.method, (sample,), {}, joining.describe(self.method.parameters, (sample,), {}), Overlay(), Costs()
            )
            for sample in (torch.full((1, 2), float(index)) for index in range(count))
        ]
        return sum(outcome is not None for outcome in self.batches.run(calls).outcomes)


@pytest.fixture(autouse=True)
def _as_in_the_engine() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_the_allocator_says_what_a_call_takes_at_its_peak() -> None:
    def call() -> torch.Tensor:
        first = torch.empty(8 * MIB, dtype=torch.uint8)
        second = torch.empty(4 * MIB, dtype=torch.uint8)
        del first
        return second + torch.empty(1, dtype=torch.uint8)

    with Meter(CPU) as meter:
        call()
    assert 12 * MIB <= meter.peak_bytes < 12 * MIB + 4096
    with Meter(CPU) as meter:
        call()
    assert meter.peak_bytes < 12 * MIB + 4096


def test_batches_are_as_large_as_there_is_room_for_once_it_is_known_what_they_take() -> None:
    bench = Bench(room=100 * MIB)
    # The first calls of a kind are run alone and together.
    assert bench.run(2) == 2
    assert bench.run(8) == 3
    assert bench.run(3) == 3
    assert bench.run(2) == 2
    assert Bench(room=1000 * MIB).run(2) == 2


def test_what_a_call_works_in_is_booked_while_it_runs() -> None:
    bench = Bench(room=100 * MIB)
    bench.run(1)
    bench.run(1)
    assert bench.booked[0] == 0
    assert 32 * MIB <= bench.booked[1] < 33 * MIB
    assert bench.ledger.claimed_bytes == 0
    assert bench.counts.estimate_ratios["working_set"].count == 2


def test_a_call_that_is_larger_than_the_room_is_tried_all_the_same_after_idle_ones_were_asked_to_leave() -> None:
    bench = Bench(room=20 * MIB)
    assert bench.run(1) == bench.run(1) == 1
    ((short, reason),) = bench.pantry.asked
    assert 12 * MIB <= short < 13 * MIB
    assert reason == "room"
    assert bench.booked[-1] == 20 * MIB

"""Calls that run out of memory, with a kernel that really refuses it: each rung, and what is said when none helps."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from denoised.errors import DeviceOutOfMemoryError
from denoised_server.worker import joining
from denoised_server.worker.batches import Batches, Call, Costs, Ran
from denoised_server.worker.inputs import Inputs
from denoised_server.worker.memory_counts import MemoryCounts
from denoised_server.worker.meter import Meter
from denoised_server.worker.overlay import Overlay
from denoised_server.worker.recovery import Recovery
from denoised_server.worker.seam import Method
from denoised_server.worker.tallies import Lone
from diffusers import AutoencoderKL
from torch import nn

from tests.memory_limit import MIB, limited

CPU = torch.device("cpu")
ROW = 128 * MIB


@pytest.fixture(autouse=True)
def _as_in_the_engine() -> Iterator[None]:
    with torch.no_grad():
        yield


def hungry(sample: torch.Tensor) -> torch.Tensor:
    """Takes ROW bytes for each sample, for as long as it runs."""
    scratch = torch.empty(sample.shape[0], ROW, dtype=torch.uint8)
    assert scratch.shape[0] == sample.shape[0]
    return sample * 2


def method(function: Callable[..., Any], module: nn.Module | None = None, name: str = "forward") -> Method:
    return Method(module or nn.Identity(), name, function, joining.parameters(function))


def call(made_of: Method, sample: torch.Tensor, lone: Lone = Lone.UNBATCHED) -> Call:
    arguments = None if lone is Lone.FORBIDDEN else joining.describe(made_of.parameters, (sample,), {})
    return Call(made_of, (sample,), {}, arguments, Overlay(), Costs(), lone)


def rungs(calls: list[Call]) -> list[list[str]]:
    return [[str(rung) for rung in each.costs.recoveries] for each in calls]


def helped(counts: MemoryCounts) -> dict[str, int]:
    return {rung: count for rung, count in counts.recoveries.items() if count}


def values(ran: Ran) -> list[Any]:
    assert all(outcome is not None and outcome.error is None for outcome in ran.outcomes)
    return [outcome.value for outcome in ran.outcomes if outcome is not None]


class Pantry:
    """Makes room by letting go of memory that it really holds."""

    def __init__(self, idle: int = 0, needed_later: int = 0) -> None:
        self.idle, self.needed_later = (
            torch.empty(idle, dtype=torch.uint8),
            torch.empty(needed_later, dtype=torch.uint8),
        )
        self.asked: list[int] = []

    def evict_idle(self, needed_bytes: int, reason: str = "out_of_memory") -> int:
        self.asked.append(needed_bytes)
        freed, self.idle = self.idle.nbytes, torch.empty(0)
        return freed

    def offload(self, keep: nn.Module) -> int:
        freed, self.needed_later = self.needed_later.nbytes, torch.empty(0)
        return freed


class Cycle:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.weights, self.itself = torch.empty(2 * ROW, dtype=torch.uint8), self


def test_caches_are_freed_first() -> None:
    counts = MemoryCounts()
    batches, made_of = Batches(Recovery(CPU, counts=counts)), method(hungry)
    gc.disable()
    try:
        Cycle()
        lone = call(made_of, torch.ones(1, 2))
        with limited(ROW // 2):
            (value,) = values(batches.run([lone]))
    finally:
        gc.enable()
    assert torch.equal(value, torch.full((1, 2), 2.0))
    assert rungs([lone]) == [["free_caches"]]
    assert helped(counts) == {"free_caches": 1}


def test_what_is_idle_leaves_for_a_call_and_the_need_was_measured() -> None:
    pantry = Pantry(idle=2 * ROW)
    batches, lone = Batches(recovery=Recovery(CPU, room=pantry)), call(method(hungry), torch.ones(1, 2))
    with limited(ROW // 2):
        values(batches.run([lone]))
    assert rungs([lone]) == [["evict_idle"]]
    assert pantry.asked[0] >= ROW


def test_what_others_need_later_leaves_last() -> None:
    pantry = Pantry(needed_later=2 * ROW)
    batches, lone = Batches(recovery=Recovery(CPU, room=pantry)), call(method(hungry), torch.ones(1, 2))
    with limited(ROW // 2):
        values(batches.run([lone]))
    assert rungs([lone]) == [["offload"]]
    assert len(pantry.asked) == 1


@pytest.mark.parametrize(("fitting", "rung"), [(2, ["split"]), (1, ["split", "run_alone"])])
def test_a_batch_is_taken_apart_until_its_parts_fit(fitting: int, rung: list[str]) -> None:
    batches, made_of = Batches(), method(hungry)
    values(batches.run([call(made_of, torch.full((1, 2), float(index))) for index in range(2)]))
    calls = [call(made_of, torch.full((1, 2), float(index))) for index in range(4)]
    with limited(fitting * ROW + ROW // 2):
        results = values(batches.run(calls))
    assert [float(result[0, 0]) for result in results] == [0.0, 2.0, 4.0, 6.0]
    assert [sorted(each) for each in rungs(calls)] == [sorted(rung)] * 4


def test_only_the_request_that_does_not_fit_fails_and_it_is_told_its_need() -> None:
    def greedy(sample: torch.Tensor) -> torch.Tensor:
        # What a sample needs is in the sample: shapes do not tell.
        scratch = torch.empty(int(sample.sum()) * MIB, dtype=torch.uint8)
        return sample + min(scratch.nbytes, 0)

    counts = MemoryCounts()
    batches, made_of = Batches(Recovery(CPU, counts=counts)), method(greedy)
    batches.run([call(made_of, torch.full((1, 2), float(index))) for index in range(2)])
    calls = [call(made_of, torch.full((1, 2), size)) for size in (1.0, 400.0, 1.0)]
    with limited(256 * MIB):
        outcomes = batches.run(calls).outcomes
    errors = [None if outcome is None else outcome.error for outcome in outcomes]
    assert errors[0] is errors[2] is None
    assert isinstance(errors[1], DeviceOutOfMemoryError)
    assert errors[1].code == "RESOURCE_EXHAUSTED"
    assert int(errors[1].metadata["needed_bytes"]) >= 800 * MIB
    assert errors[1].metadata["tried"] == "free_caches"
    assert helped(counts) == {"run_alone": 1, "split": 1, "none": 1}


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    ).eval()


def peak(compute: Callable[[], Any]) -> int:
    with Meter(CPU) as meter:
        compute()
    return meter.peak_bytes


@pytest.mark.parametrize(("rows", "side", "rung"), [(4, 64, "slice"), (1, 128, "tile")])
def test_a_vae_works_in_pieces_for_the_call_that_needs_it(vae: AutoencoderKL, rows: int, side: int, rung: str) -> None:
    latents = torch.randn(rows, 4, side, side)
    decode = method(vae.decode, vae, "decode")
    expected = vae.decode(latents).sample
    whole = peak(lambda: vae.decode(latents))
    batches, lone = Batches(), call(decode, latents)
    with limited(whole // 2):
        (value,) = values(batches.run([lone]))
    assert rungs([lone]) == [[rung]]
    assert not vae.use_slicing
    assert not vae.use_tiling
    assert vae.tile_latent_min_size == 32
    difference = (value.sample - expected).abs().mean() / expected.abs().mean()
    assert difference < (1e-5 if rung == "slice" else 0.5)


def test_a_request_that_was_promised_exact_bits_is_never_tiled(vae: AutoencoderKL) -> None:
    latents = torch.randn(1, 4, 128, 128)
    whole = peak(lambda: vae.decode(latents))
    batches, lone = Batches(), call(method(vae.decode, vae, "decode"), latents, Lone.FORBIDDEN)
    with limited(whole // 2):
        (outcome,) = batches.run([lone]).outcomes
    assert outcome is not None
    assert isinstance(outcome.error, DeviceOutOfMemoryError)
    assert "batched" in str(outcome.error.hint)


def test_a_call_that_has_changed_its_arguments_is_not_run_again() -> None:
    def in_place(sample: torch.Tensor) -> torch.Tensor:
        return hungry(sample.mul_(2))

    sample = torch.ones(1, 2)
    batches, lone = Batches(recovery=Recovery(CPU, room=Pantry(idle=2 * ROW))), call(method(in_place), sample)
    with limited(ROW // 2):
        (outcome,) = batches.run([lone]).outcomes
    assert outcome is not None
    assert isinstance(outcome.error, DeviceOutOfMemoryError)
    assert torch.equal(sample, torch.full((1, 2), 2.0))


def test_generators_are_where_they_were_when_a_call_runs_again() -> None:
    def drawing(sample: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        drawn = torch.rand(2, generator=generator)
        hungry(sample)
        return drawn

    generator = torch.Generator().manual_seed(7)
    made_of = method(drawing)
    lone = Call(made_of, (torch.ones(1, 2), generator), {}, None, Overlay(), Costs())
    batches = Batches(recovery=Recovery(CPU, room=Pantry(idle=2 * ROW)))
    with limited(ROW // 2):
        (value,) = values(batches.run([lone]))
    assert torch.equal(value, torch.rand(2, generator=torch.Generator().manual_seed(7)))


def test_inputs_are_counted_by_sample() -> None:
    inputs = Inputs([torch.ones(2, 4, 8, 6), torch.tensor(3), [torch.ones(2, 5)], {"ids": torch.ones(7, 7)}, "text"])
    assert (inputs.rows, inputs.row_bytes, inputs.side, inputs.dtype) == (2, (4 * 8 * 6 + 5) * 4, 8, "float32")

"""Joined calls are believed only for what was seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from denoised_server.worker import joining
from denoised_server.worker.batches import Batches, Call, Costs
from denoised_server.worker.overlay import Overlay
from denoised_server.worker.seam import Method
from torch import nn


def method(function: Callable[..., Any]) -> Method:
    return Method(nn.Identity(), "forward", function, joining.parameters(function))


def call(made_of: Method, sample: torch.Tensor, timestep: Any = 1, **more: Any) -> Call:
    kwargs = {"sample": sample, "timestep": torch.tensor(timestep), **more}
    return Call(made_of, (), kwargs, joining.describe(made_of.parameters, (), kwargs), Overlay(), Costs())


def values(batches: Batches, calls: list[Call]) -> list[torch.Tensor]:
    """Results in order; calls that have to wait, or that stand alone, are run by themselves, as the engine would."""
    if calls[0].key is None:
        outcomes = [outcome for each in calls for outcome in batches.run([each]).outcomes]
    else:
        outcomes = list(batches.run(calls).outcomes)
    waiting = [each for each, outcome in zip(calls, outcomes, strict=True) if outcome is None]
    later = iter(batches.run(waiting).outcomes) if waiting else iter(())
    found = [outcome if outcome is not None else next(later) for outcome in outcomes]
    assert all(outcome is not None and outcome.error is None for outcome in found)
    return [outcome.value for outcome in found if outcome is not None]


def add(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    return sample + timestep.reshape(-1, 1) if timestep.dim() else sample + timestep


def test_a_kind_is_run_both_ways_once_and_joined_from_then_on() -> None:
    batches, honest = Batches(), method(add)
    for _ in range(3):
        calls = [call(honest, torch.full((1, 2), float(index)), index) for index in range(3)]
        results = values(batches, calls)
        assert [result[0, 0].item() for result in results] == [0.0, 2.0, 4.0]
    assert calls[0].costs.max_joined == 3
    assert batches.counts["verified_kinds"] == 1
    assert batches.counts["refused_kinds"] == 0
    stats = batches.tallies[str(honest)].stats("add")
    assert (stats.calls, stats.joined_calls) == (9, 6)
    assert stats.lone_calls == {"verifying": 2, "unmatched": 1}
    assert stats.agreed_difference is not None
    assert stats.agreed_difference <= 1
    assert stats.refused_difference is None


def test_agreeing_at_one_timestep_says_nothing_of_two() -> None:
    def first_only(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample + timestep.reshape(-1)[0]

    batches, wrong = Batches(), method(first_only)
    for timesteps in ((5, 5), (5, 5), (5, 9), (5, 9)):
        calls = [call(wrong, torch.rand(1, 2), timestep) for timestep in timesteps]
        for each, result in zip(calls, values(batches, calls), strict=True):
            assert torch.equal(result, each.kwargs["sample"] + each.kwargs["timestep"])
    assert batches.counts["refused_kinds"] == 1


def test_results_that_are_not_finite_prove_nothing() -> None:
    def mixing(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample - sample.mean(0, keepdim=True)

    batches, wrong = Batches(), method(mixing)
    values(batches, [call(wrong, torch.full((1, 2), float("nan"))) for _ in range(2)])
    good = [call(wrong, torch.full((1, 2), float(index))) for index in range(2)]
    assert [result.sum().item() for result in values(batches, good)] == [0.0, 0.0]
    assert batches.counts["verified_kinds"] == 0


def test_one_huge_element_hides_no_difference() -> None:
    def mixing(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        mixed = sample.mean(0, keepdim=True).expand_as(sample).clone()
        mixed[:, 0] = 500
        return mixed

    batches, wrong = Batches(), method(mixing)
    calls = [call(wrong, torch.rand(1, 4096).bfloat16()) for _ in range(2)]
    values(batches, calls)
    assert batches.counts["refused_kinds"] == 1


def test_numbers_of_another_type_are_verified_anew() -> None:
    def integers(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        scale = 1 if timestep.is_floating_point() else 1000
        return add(sample, timestep * scale)

    batches, odd = Batches(), method(integers)
    for timesteps in ((1, 2), (1, 2), (0.7, 2)):
        calls = [call(odd, torch.zeros(1, 2), timestep) for timestep in timesteps]
        for each, result in zip(calls, values(batches, calls), strict=True):
            assert torch.equal(result, integers(**each.kwargs))


def test_a_call_that_works_in_place_is_run_once() -> None:
    def doubling(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample.mul_(2)

    batches, in_place = Batches(), method(doubling)
    calls = [call(in_place, torch.full((1, 2), float(index + 1))) for index in range(2)]
    assert [result[0, 0].item() for result in values(batches, calls)] == [2.0, 4.0]


def test_a_kind_that_cannot_be_joined_is_not_tried_for_ever() -> None:
    tries = []

    def single(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        tries.append(sample.shape[0])
        if sample.shape[0] > 1:
            raise RuntimeError("one at a time")
        return sample

    batches, fussy = Batches(), method(single)
    first = [call(fussy, torch.zeros(1, 2)) for _ in range(2)]
    values(batches, first)
    assert tries.count(2) == 1
    assert first[0].key is None


def test_whole_tensors_that_differ_once_may_join_later() -> None:
    def shifting(sample: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return sample + ids.sum()

    batches, honest = Batches(), method(shifting)
    ids = torch.arange(5.0)
    values(batches, [call(honest, torch.rand(1, 2), ids=ids), call(honest, torch.rand(1, 2), ids=ids + 1)])
    for _ in range(2):
        calls = [call(honest, torch.rand(1, 2), ids=ids.clone()) for _ in range(2)]
        values(batches, calls)
    assert calls[0].costs.max_joined == 2


def test_generators_stay_where_they_are() -> None:
    def ignoring(sample: torch.Tensor, timestep: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return sample * 2

    def drawing(sample: torch.Tensor, timestep: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return sample + torch.rand(sample.shape, generator=generator)

    for function, refused in ((ignoring, 0), (drawing, 1)):
        batches, made_of = Batches(), method(function)
        for round_ in range(2):
            seeds = [torch.Generator().manual_seed(round_ + index) for index in range(2)]
            twins = [torch.Generator().manual_seed(round_ + index) for index in range(2)]
            calls = [call(made_of, torch.rand(1, 2), generator=seed) for seed in seeds]
            for each, twin, result in zip(calls, twins, values(batches, calls), strict=True):
                assert torch.equal(result, function(each.kwargs["sample"], torch.tensor(1), twin))
                assert torch.equal(each.kwargs["generator"].get_state(), twin.get_state())
        assert batches.counts["refused_kinds"] == refused


def test_running_out_of_memory_together_is_no_verdict() -> None:
    limit = 1

    def limited(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if sample.shape[0] > limit:
            raise torch.OutOfMemoryError("injected")
        return sample * 2

    batches, honest = Batches(), method(limited)
    values(batches, [call(honest, torch.rand(1, 2)) for _ in range(2)])
    limit = 8
    for _ in range(2):
        calls = [call(honest, torch.rand(1, 2)) for _ in range(2)]
        values(batches, calls)
    assert calls[0].costs.max_joined == 2


@pytest.mark.parametrize("count", [2, 3, 8])
def test_only_few_calls_are_run_twice(count: int) -> None:
    rows = []

    def noting(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        rows.append(sample.shape[0])
        return add(sample, timestep)

    batches, honest = Batches(), method(noting)
    values(batches, [call(honest, torch.rand(1, 2), index) for index in range(count)])
    assert sum(rows) <= 4 + 2 * count - 2
    assert rows[:3] == [1, 1, 2]

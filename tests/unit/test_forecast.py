"""Forecasts as tables."""

from __future__ import annotations

from typing import Any

import pytest
from denoised.errors import DeadlineExceededError, DeadlineTooShortError, DeadlineUnmeetableError
from denoised_server.forecast import EVIDENCE_SECONDS, MAX_KINDS, RECENT, Cost, Demand, Forecast, check_deadline, demand
from denoised_server.messages import Finished, Generate, Loaded, Parameter, Phase, Spec

STEPS = Parameter("num_inference_steps", default=50, has_default=True)
STRENGTH = Parameter("strength", default=0.8, has_default=True)


def finished(*, encode: float = 0.0, **phases: float) -> Finished:
    """A run of these phases, one after the other."""
    now, runs = 100.0, []
    for name, seconds in phases.items():
        runs.append(Phase(name, now, now + seconds))
        now += seconds
    return Finished(now - 100.0, 0.0, encode, 0, 0, 1, phases=tuple(runs))


def asked(*parameters: Parameter, **arguments: Any) -> Demand:
    command = Generate("pipelines/a", {key: value for key, value in arguments.items() if key != "batching"})
    return demand(command, Spec("weights"), Loaded("text-to-image", "FakePipeline", (), parameters or (STEPS,)))


def test_nothing_is_known_before_the_first_one_has_ended() -> None:
    assert Forecast().cost(asked(), 0.0) == Cost(None, None)


def test_what_steps_cost_is_learned_apart_from_the_rest() -> None:
    forecast = Forecast()
    forecast.learn(Demand("a", 10), finished(text_encode=1, denoise=20, decode=2, encode=1), 0.0)
    assert forecast.cost(Demand("a", 10), 0.0) == Cost(24.0, 24.0, 3.0)
    assert forecast.cost(Demand("a", 1), 0.0) == Cost(6.0, 6.0, 3.0)
    assert forecast.cost(Demand("b", 10), 0.0) == Cost()


def test_a_kind_that_has_not_run_is_taken_for_what_others_of_its_pipeline_take() -> None:
    forecast = Forecast()
    forecast.learn(Demand("a", 10, pipeline="p"), finished(text_encode=1, denoise=20, decode=2), 0.0)
    assert forecast.cost(Demand("b", 5, pipeline="p"), 0.0) == Cost(usual=13.0)
    assert forecast.cost(Demand("b", 5, pipeline="q"), 0.0) == Cost()


def test_the_usual_is_the_mean_and_the_least_the_fastest_of_the_last_runs() -> None:
    forecast = Forecast()
    for seconds in (1, 2, 6):
        forecast.learn(Demand("a", 1), finished(denoise=seconds), 0.0)
    assert forecast.cost(Demand("a", 1), 0.0) == Cost(3.0, 1.0)
    for _ in range(RECENT):
        forecast.learn(Demand("a", 1), finished(denoise=8), 0.0)
    assert forecast.cost(Demand("a", 1), 0.0) == Cost(8.0, 8.0)


def test_a_slow_run_is_held_against_nobody_for_ever() -> None:
    forecast = Forecast()
    forecast.learn(Demand("a", 1), finished(denoise=60), 0.0)
    assert forecast.cost(Demand("a", 1), EVIDENCE_SECONDS).least == 60
    assert forecast.cost(Demand("a", 1), EVIDENCE_SECONDS + 1) == Cost(60.0, None)


def test_what_is_remembered_is_bounded() -> None:
    forecast = Forecast()
    for kind in range(MAX_KINDS + 1):
        forecast.learn(Demand(kind, 1), finished(denoise=1), 0.0)
    assert forecast.cost(Demand(0, 1), 0.0) == Cost()
    assert forecast.cost(Demand(1, 1), 0.0) != Cost()


def test_a_call_without_steps_costs_what_it_took() -> None:
    forecast = Forecast()
    forecast.learn(Demand("a", 1), finished(text_encode=2), 0.0)
    assert forecast.cost(Demand("a", 9), 0.0) == Cost(2.0, 2.0)


@pytest.mark.parametrize(
    ("parameters", "arguments", "steps"),
    [
        ((STEPS,), {}, 50),
        ((STEPS,), {"num_inference_steps": 4}, 4),
        ((STEPS, STRENGTH), {"num_inference_steps": 10}, 8),
        ((STEPS, STRENGTH), {"num_inference_steps": 10, "strength": 0.5}, 5),
        ((STEPS, STRENGTH), {"strength": 0.0}, 1),
        ((Parameter("audio"),), {}, 1),
    ],
)
def test_steps_are_those_that_will_be_run(
    parameters: tuple[Parameter, ...], arguments: dict[str, Any], steps: float
) -> None:
    assert asked(*parameters, **arguments).steps == steps


@pytest.mark.parametrize(
    "arguments", [{"height": 64}, {"num_images_per_prompt": 2}, {"prompt": ["a", "b"]}, {"guidance_scale": 7.5}]
)
def test_what_makes_a_step_cost_more_makes_another_kind(arguments: dict[str, Any]) -> None:
    assert asked(**arguments).kind != asked().kind
    assert asked(**arguments).kind == asked(num_inference_steps=3, **arguments).kind


def test_only_what_is_known_to_be_too_late_is_refused() -> None:
    check_deadline(1.0, Cost(), 0.0)
    check_deadline(1.0, Cost(usual=5.0), 0.0)
    check_deadline(1.0, Cost(usual=5.0, least=1.0), 0.0)
    with pytest.raises(DeadlineTooShortError) as short:
        check_deadline(1.0, Cost(usual=5.0, least=1.5), 9.0)
    assert short.value.retry_after is None
    assert isinstance(short.value, DeadlineExceededError)
    with pytest.raises(DeadlineUnmeetableError) as late:
        check_deadline(3.0, Cost(least=1.0), 10.0)
    assert late.value.retry_after == 8.0
    with pytest.raises(DeadlineUnmeetableError):
        check_deadline(3.0, Cost(), 10.0)

"""Several calls as one, and one result as several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from denoised_server.worker import joining
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


def forward(
    sample: Any, timestep: Any, encoder_hidden_states: Any, added: Any = None, return_dict: bool = True
) -> None:
    """Its signature is what matters."""


NAMES = joining.parameters(forward)


def call(*args: Any, **kwargs: Any) -> Any:
    return joining.describe(NAMES, args, kwargs)


def test_rows_are_concatenated_and_timesteps_get_one_row_each() -> None:
    first = call(torch.zeros(2, 4, 8), torch.tensor(7), encoder_hidden_states=torch.zeros(2, 3))
    second = call(torch.ones(1, 4, 8), torch.tensor(9), encoder_hidden_states=torch.ones(1, 3))
    assert first.key == second.key
    args, kwargs = joining.join([first, second])
    assert args == ()
    assert kwargs["sample"].shape == (3, 4, 8)
    assert kwargs["timestep"].tolist() == [7, 7, 9]


def test_integer_and_float_timesteps_join() -> None:
    first = call(torch.zeros(1, 2), torch.tensor(7), torch.zeros(1, 3))
    second = call(torch.zeros(1, 2), torch.tensor(6.5), torch.zeros(1, 3))
    assert first.key == second.key
    assert joining.join([first, second])[1]["timestep"].tolist() == [7.0, 6.5]


def test_one_call_spelled_in_two_ways_has_one_key() -> None:
    sample, text = torch.zeros(1, 2), torch.zeros(1, 3)
    by_position = call(sample, torch.tensor(1), text)
    by_name = call(sample, encoder_hidden_states=text, timestep=torch.tensor(2), added=None, return_dict=True)
    assert by_position.key == by_name.key


@pytest.mark.parametrize(
    "other",
    [
        (torch.zeros(1, 3), torch.tensor(1), torch.zeros(1, 3)),
        (torch.zeros(1, 2).half(), torch.tensor(1), torch.zeros(1, 3)),
        (torch.zeros(1, 2), torch.tensor(1), torch.zeros(1, 3), {"text": torch.zeros(1, 1)}),
    ],
    ids=["shape", "dtype", "structure"],
)
def test_what_differs_does_not_join(other: tuple[Any, ...]) -> None:
    assert call(torch.zeros(1, 2), torch.tensor(1), torch.zeros(1, 3)).key != call(*other).key


def test_a_tensor_without_rows_has_to_be_equal() -> None:
    ids = torch.arange(5.0)
    first = call(torch.zeros(1, 2), torch.tensor(1), torch.zeros(1, 3), ids)
    same = call(torch.zeros(1, 2), torch.tensor(1), torch.zeros(1, 3), ids.clone())
    other = call(torch.zeros(1, 2), torch.tensor(1), torch.zeros(1, 3), ids + 1)
    assert torch.equal(joining.join([first, same])[1]["added"], ids)
    with pytest.raises(joining.NotJoinableError):
        joining.join([first, other])


def test_a_call_without_rows_stands_alone() -> None:
    assert call(None, torch.tensor(1), None) is None


def test_results_of_every_shape_are_taken_apart() -> None:
    rows = torch.arange(6.0).reshape(3, 2)
    posterior = AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(torch.arange(12.0).reshape(3, 4, 1, 1)))
    read: Callable[[Any], Any]
    for result, read in ((rows, lambda x: x), ((rows,), lambda x: x[0]), ([None, rows], lambda x: x[1])):
        first, second = joining.split(result, [2, 1])
        assert read(first).tolist() == rows[:2].tolist()
        assert read(second).tolist() == rows[2:].tolist()
    first, second = joining.split(posterior, [1, 2])
    assert first.latent_dist.parameters.shape[0] == 1
    assert second.latent_dist.mean.shape == (2, 2, 1, 1)


@pytest.mark.parametrize("result", [torch.tensor(1.0), torch.zeros(4, 2), object()])
def test_a_result_without_rows_cannot_be_taken_apart(result: object) -> None:
    with pytest.raises(joining.NotJoinableError):
        joining.split(result, [2, 1])


def test_difference_tells_rounding_from_error() -> None:
    exact = torch.tensor([1.0, 2.0])
    assert joining.difference((exact + 1e-5,), (exact,)) <= 1
    assert joining.difference((exact + 1e-2,), (exact,)) > 1
    assert joining.difference(exact[:1], exact) == float("inf")
    assert joining.difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")


def test_a_joined_result_that_is_not_finite_where_the_lone_one_is_counts_as_error() -> None:
    assert not joining.difference(torch.tensor([float("nan"), 2.0]), torch.tensor([1.0, 2.0])) <= 1

"""Several calls as one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from denoised_server.worker import joining


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


def test_lists_with_an_element_for_each_sample_are_put_one_after_another() -> None:
    """As Z-Image has them: latents and prompts of any length, and one timestep for each."""
    latents = [torch.full((16, 1, 8, 8), float(index)) for index in range(3)]
    prompts = [torch.zeros(length, 4) for length in (5, 9, 2)]
    masks = [[0, 1], [0], [0, 0, 1]]
    first = call(latents[:2], torch.tensor([1.0, 2.0]), prompts[:2], masks[:2])
    second = call(latents[2:], torch.tensor([3.0]), prompts[2:], masks[2:])
    assert (first.rows, second.rows) == (2, 1)
    assert first.key == second.key
    kwargs = joining.join([first, second])[1]
    assert [latent.mean().item() for latent in kwargs["sample"]] == [0.0, 1.0, 2.0]
    assert [len(prompt) for prompt in kwargs["encoder_hidden_states"]] == [5, 9, 2]
    assert kwargs["timestep"].tolist() == [1.0, 2.0, 3.0]
    assert kwargs["added"] == masks
    assert joining.varied([first, second]) == {0, 1, 2, 3}


def test_lists_of_tensors_with_rows_stay_lists() -> None:
    """As ControlNets give their residuals: here as many as there are samples."""
    residuals = [torch.zeros(2, 3), torch.ones(2, 5)]
    first, second = (call(torch.zeros(2, 4), torch.tensor(1), torch.zeros(2, 3), residuals) for _ in range(2))
    assert first.rows == 2
    assert [residual.shape for residual in joining.join([first, second])[1]["added"]] == [(4, 3), (4, 5)]


def test_a_call_with_one_number_for_each_sample_has_rows() -> None:
    first, second = (call(torch.tensor([seconds]), None, None) for seconds in (1.0, 2.0))
    assert joining.join([first, second])[1]["sample"].tolist() == [1.0, 2.0]

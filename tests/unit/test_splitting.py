"""One result as several, and how far results are apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from denoised_server.worker import splitting
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

ROWS = [2, 1]


def cache(rows: torch.Tensor) -> DynamicCache:
    """Of two layers, with keys and values that tell which sample they are of."""
    made = DynamicCache()
    for layer in range(2):
        keys = rows.reshape(-1, 1, 1, 1).expand(-1, 2, 5, 3) + layer
        made.update(keys, -keys, layer)
    return made


def output(rows: torch.Tensor) -> BaseModelOutputWithPast:
    states = rows.reshape(-1, 1, 1).expand(-1, 5, 4)
    return BaseModelOutputWithPast(states, cache(rows), hidden_states=(states, states + 1))


RESULTS = {
    "rows": lambda rows: rows.reshape(-1, 1) * torch.ones(2),
    "tuple": lambda rows: (None, rows * 2),
    "list": lambda rows: [rows, rows.reshape(-1, 1)],
    "samples in the second dimension": lambda rows: rows.expand(7, -1) + torch.arange(7.0).reshape(-1, 1),
    "two places for each sample": lambda rows: rows.repeat_interleave(2),
    "one element for each sample": lambda rows: ([torch.full((index + 1,), row) for index, row in enumerate(rows)],),
    "the same for all": lambda rows: {"sample": rows, "grid": torch.arange(4.0), "scale": 0.5},
    "posterior": lambda rows: AutoencoderKLOutput(
        latent_dist=DiagonalGaussianDistribution(rows.reshape(-1, 1, 1, 1).expand(-1, 4, 1, 1))
    ),
    "keys and values": output,
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_of_every_kind_are_taken_apart(name: str) -> None:
    make: Any = RESULTS[name]
    samples = torch.tensor([3.0, 5.0, 9.0])
    alone = [make(samples[:2]), make(samples[2:])]
    if name == "one element for each sample":
        alone[1] = ([torch.full((3,), 9.0)],)
    joined = make(samples)
    parts = splitting.split(joined, ROWS, splitting.layout(joined, alone))
    for part, expected in zip(parts, alone, strict=True):
        assert type(part) is type(expected)
        assert splitting.difference(part, expected) == 0


def test_a_cache_that_was_taken_apart_goes_on_by_itself() -> None:
    joined, alone = output(torch.tensor([1.0, 2.0])), [output(torch.tensor([value])) for value in (1.0, 2.0)]
    first, second = splitting.split(joined, [1, 1], splitting.layout(joined, alone))
    more = torch.zeros(1, 2, 1, 3)
    first.past_key_values.update(more, more, 0)
    assert first.past_key_values.get_seq_length() == 6
    assert second.past_key_values.get_seq_length() == 5
    assert joined.past_key_values.get_seq_length() == 5


@pytest.mark.parametrize(
    ("joined", "alone"),
    [
        (torch.zeros(4, 2), [torch.zeros(2, 2), torch.zeros(1, 2)]),
        (torch.zeros(3, 3), [torch.zeros(2, 2), torch.zeros(1, 1)]),
        (torch.zeros(3), [torch.zeros(2, 1), torch.zeros(1, 1)]),
        ([1, 2, 3, 4], [[1, 2], [3]]),
        ({"a": 1}, [{"a": 1}, {"b": 1}]),
        ((), [[], []]),
    ],
    ids=["too long", "two dimensions", "another dimension", "list", "names", "types"],
)
def test_what_does_not_fit_cannot_be_taken_apart(joined: Any, alone: list[Any]) -> None:
    with pytest.raises(splitting.NotSplittableError):
        splitting.layout(joined, alone)


def test_what_nobody_knows_differs() -> None:
    assert splitting.difference(object(), object()) == math.inf


def test_difference_tells_rounding_from_error() -> None:
    exact = torch.tensor([1.0, 2.0])
    assert splitting.difference((exact + 1e-5,), (exact,)) <= 1
    assert splitting.difference((exact + 1e-2,), (exact,)) > 1
    assert splitting.difference(exact[:1], exact) == math.inf
    assert splitting.difference([exact], [exact, exact]) == math.inf
    assert splitting.difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == math.inf
    assert splitting.difference(cache(exact), cache(exact + 1e-2)) > 1


def test_a_joined_result_that_is_not_finite_where_the_lone_one_is_counts_as_error() -> None:
    assert not splitting.difference(torch.tensor([math.nan, 2.0]), torch.tensor([1.0, 2.0])) <= 1

"""torch's own generators, to each request by itself."""

from __future__ import annotations

import torch
from denoised_server.worker import randomness
from denoised_server.worker.randomness import Randomness


def alone(seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(3) for _ in range(4)]


def test_requests_that_take_turns_draw_what_each_draws_alone() -> None:
    expected = {seed: alone(seed) for seed in (7, 8)}
    requests = {seed: Randomness(seed, torch.device("cpu")) for seed in (7, 8)}
    drawn: dict[int, list[torch.Tensor]] = {7: [], 8: []}
    for turn, seed in enumerate((7, 8, 8, 7, 7, 8, 7, 8)):
        requests[seed].put_on()
        drawn[seed].append(torch.randn(3))
        if turn % 3 == 0:
            randomness.put_away()
            torch.manual_seed(0)  # what others draw in between
    for seed, tensors in drawn.items():
        for left, right in zip(tensors, expected[seed], strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=0)

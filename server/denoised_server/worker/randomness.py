"""torch's own random generators, as one request has them to itself.

Callers bring generators, but some pipelines draw from the process-wide ones as well: ControlNets of Stable Diffusion 3
and the control of CogView 4 encode their condition so. What such a request draws would depend on all that ran before.
"""

from __future__ import annotations

import torch


class Randomness:
    """The process-wide generators after `torch.manual_seed(seed)` and whatever the request has drawn since."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index or 0])
        self._states: list[torch.Tensor] = []

    def put_on(self) -> None:
        if not self._states:
            for generator in self._generators:
                generator.manual_seed(self._seed)
        for generator, state in zip(self._generators, self._states, strict=False):
            generator.set_state(state)

    def take_off(self) -> None:
        """What others find is no matter: each request puts on its own."""
        self._states = [generator.get_state() for generator in self._generators]

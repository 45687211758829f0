"""torch's own random generators, as one request has them to itself.

Callers bring generators, but some pipelines draw from the process-wide ones as well: ControlNets of Stable Diffusion 3
and the control of CogView 4 encode their condition so. What such a request draws would depend on all that ran before.
"""

from __future__ import annotations

import torch


class Randomness:
    """The process-wide generators after `torch.manual_seed(seed)` and whatever the request has drawn since.

    Whoever draws from them next puts its own on, or puts away what is on: so a request that runs by itself, which is
    switched out and in at each call, keeps them.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index or 0])
        self._states: list[torch.Tensor] = []

    def put_on(self) -> None:
        global _worn
        if _worn is self:
            return
        put_away()
        if not self._states:
            for generator in self._generators:
                generator.manual_seed(self._seed)
        for generator, state in zip(self._generators, self._states, strict=False):
            generator.set_state(state)
        _worn = self

    def _save(self) -> None:
        self._states = [generator.get_state() for generator in self._generators]


_worn: Randomness | None = None


def put_away() -> None:
    """Keeps what is on from whatever draws next. What that finds is no matter."""
    global _worn
    if _worn is not None:
        _worn._save()
        _worn = None

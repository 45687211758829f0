"""Callbacks and prompts of families that do these in their own ways: remotely as in this process."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.daemon import Daemon

from .checkpoints import FAMILIES
from .checkpoints.family import Family
from .pair import Pairs, numbers, seeded

torch.set_num_threads(1)
NAMES = ("stable-diffusion-xl", "if", "kandinsky", "kandinsky22", "kandinsky3")
CHOSEN = {family.name: family for family in reversed(FAMILIES) if family.name in NAMES}
TASK = "text-to-image"


@pytest.fixture(scope="module")
def pairs(daemon: Daemon, checkpoint_dir: Path) -> Iterator[Pairs]:
    with daemon.client() as client, Pairs(client, checkpoint_dir / "callbacks") as pairs:
        yield pairs


each_family = pytest.mark.parametrize("family", CHOSEN.values(), ids=CHOSEN, scope="module")


class Recorder:
    """A callback of any form that remembers what it is told, and makes the latents a little smaller."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Any, Any]] = []

    def on_step_end(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.seen.append((step, numbers(timestep), {name: numbers(value) for name, value in tensors.items()}))
        return {"latents": tensors["latents"] * 0.99}

    def legacy(self, step: int, timestep: Any, latents: Any) -> None:
        self.seen.append((step, numbers(timestep), numbers(latents)))


def call(pair: Any, *, remote: bool, **more: Any) -> Any:
    pipe = (pair.remote if remote else pair.local)[TASK]
    arguments = pair.arguments(TASK) | more | ({"batching": "forbid"} if remote else {})
    with torch.no_grad():
        return numbers(pipe(**arguments, generator=seeded(0)).images)


def names_of(pair: Any) -> list[str]:
    return [name for name in inspect.signature(type(pair.local[TASK]).__call__).parameters if "callback" in name]


@each_family
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_each_callback_of_a_family_is_asked_as_diffusers_asks_it(pairs: Pairs, family: Family) -> None:
    pair = pairs.of(family)
    callbacks = [name for name in names_of(pair) if name.endswith(("callback", "on_step_end"))]
    assert callbacks
    for name in callbacks:
        here, there = Recorder(), Recorder()
        method = "legacy" if name == "callback" else "on_step_end"
        expected = call(pair, remote=False, **{name: getattr(here, method)})
        actual = call(pair, remote=True, **{name: getattr(there, method)})
        np.testing.assert_array_equal(actual, expected)
        assert len(here.seen) == len(there.seen) > 0
        for one, other in zip(here.seen, there.seen, strict=True):
            np.testing.assert_equal(other, one)


@each_family
def test_every_family_has_callback_on_step_end(pairs: Pairs, family: Family) -> None:
    pair = pairs.of(family)
    plain = call(pair, remote=True)
    seen: list[int] = []

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        assert np.isfinite(numbers(tensors["latents"])).all()
        seen.append(step)

    np.testing.assert_array_equal(call(pair, remote=True, callback_on_step_end=look), plain)
    assert seen[0] == 0
    changed = call(pair, remote=True, callback_on_step_end=Recorder().on_step_end)
    assert not np.array_equal(changed, plain), "what a callback returns has effect"


@each_family
def test_prompts_are_encoded_as_in_this_process(pairs: Pairs, family: Family) -> None:
    pair = pairs.of(family)
    here, there = pair.local[TASK], pair.remote[TASK]
    if not hasattr(here, "encode_prompt"):
        with pytest.raises(AttributeError, match="encode_prompt"):
            there.encode_prompt("a cat")
        return
    arguments: dict[str, Any] = {"do_classifier_free_guidance": True, "negative_prompt": "a dog", "device": "cpu"}
    if "num_images_per_prompt" in inspect.signature(here.encode_prompt).parameters:
        arguments["num_images_per_prompt"] = 1
    with torch.no_grad():
        expected = here.encode_prompt("a cat", **arguments)
    actual = there.encode_prompt("a cat", **arguments, batching="forbid")
    assert [None if value is None else numbers(value).shape for value in actual] == [
        None if value is None else numbers(value).shape for value in expected
    ]
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_equal(numbers(one), numbers(other))

"""Every family that diffusers maps, each of its tasks, remotely and in this process.

With batching forbidden every bit is the same; joined with others, outputs differ by no more than the family's
tolerance. `-k flux` runs the families with that name.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from denoised.callbacks import LEGACY, ON_STEP_END, PRIOR
from denoised_server.worker.families import MAPPINGS
from diffusers.pipelines import auto_pipeline

from tests.daemon import Daemon

from . import table
from .checkpoints import FAMILIES, NOT_BUILT
from .checkpoints.family import Family
from .pair import Pairs, numbers
from .recorder import Recorder

torch.set_num_threads(1)
# Pipelines warn about what they themselves call.
pytestmark = pytest.mark.filterwarnings("ignore")
Case: TypeAlias = tuple[Family, str]
CASES: list[Case] = [(family, task) for family in FAMILIES for task in family.mapped()]
NAMES = [f"{family}-{task}" for family, task in CASES]
MAPPING = re.compile(r"AUTO_\w+_PIPELINES_MAPPING")
# Arguments of `encode_prompt`, for families that take them.
ENCODED = {
    "prompt": "a cat",
    "prompt_2": "a hat",
    "prompt_3": None,
    "negative_prompt": "a dog",
    "device": "cpu",
    "do_classifier_free_guidance": True,
    "num_images_per_prompt": 1,
    "num_waveforms_per_prompt": 1,
    "max_sequence_length": 32,
    "grid_h": 4,
    "grid_w": 4,
}
TOGETHER = 3
# Requests at once may pass each other by: they are sent again until some met.
ROUNDS = 20

# Of the test of leaving, which takes longest: those that change components while they run, or keep state on them, and
# two that do not. `DENOISED_EVERY_FAMILY=1` runs all of them.
LEFT = ("stable-diffusion-pag", "stable-diffusion-xl", "sana-pag", "kandinsky", "flux", "wan")


@pytest.fixture(scope="module")
def pairs(daemon: Daemon, checkpoint_dir: Path) -> Iterator[Pairs]:
    with daemon.client() as client, Pairs(client, checkpoint_dir / "families") as pairs:
        yield pairs


# One argument of module scope, so that the tests of a family follow each other and its checkpoint is built once.
each_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            marks=[
                pytest.mark.package,
                pytest.mark.skipif(case[0].is_missing_a_package, reason=f"needs {case[0].needs}"),
            ]
            if case[0].needs
            else [],
        )
        for case in CASES
    ],
    ids=NAMES,
    scope="module",
)


class LeftError(Exception):
    """A caller leaves in the middle of a step."""


def test_every_name_that_diffusers_maps_is_built_or_has_a_reason() -> None:
    mappings = [value for name, value in vars(auto_pipeline).items() if MAPPING.fullmatch(name)]
    names = {name for mapping in mappings for name in mapping}
    assert {family.name for family in FAMILIES} | NOT_BUILT.keys() == names
    assert not {family.name for family in FAMILIES} & NOT_BUILT.keys()
    tasks = {(family.name, task) for family, task in CASES}
    mapped = {(name, task) for task, mapping in MAPPINGS.items() for name in mapping if name not in NOT_BUILT}
    assert tasks == mapped


def test_the_table_in_the_docs_is_what_this_suite_asserts() -> None:
    assert table.PAGE.read_text() == table.written(table.PAGE.read_text())


@each_case
def test_alone_every_bit_is_the_same(pairs: Pairs, case: Case) -> None:
    family, task = case
    pair = pairs.of(family)
    expected = pair.here(task)
    result = pair.there(task, batching="forbid")
    assert list(result) == list(expected)
    for name, value in expected.items():
        assert type(result[name]) is type(value)
        np.testing.assert_equal(numbers(result[name]), numbers(value))
    assert all(np.isfinite(value).all() for value in expected.values() if isinstance(value, np.ndarray))


@each_case
def test_what_is_left_at_a_step_leaves_every_bit_as_it_was(pairs: Pairs, case: Case) -> None:
    family, task = case
    if str(family) not in LEFT and not os.environ.get("DENOISED_EVERY_FAMILY"):
        pytest.skip("is run with DENOISED_EVERY_FAMILY=1")
    pair = pairs.of(family)

    def leave(*_: object, **__: object) -> None:
        raise LeftError

    expected = pair.here(task, 1)
    with pytest.raises(LeftError):
        pair.there(task, batching="allow", callback_on_step_end=leave)
    result = pair.there(task, 1, batching="forbid")
    for name, value in expected.items():
        np.testing.assert_equal(numbers(result[name]), numbers(value))


@each_case
def test_together_outputs_differ_by_rounding(pairs: Pairs, case: Case) -> None:
    family, task = case
    pair = pairs.of(family)
    expected = [pair.here(task, index) for index in range(TOGETHER)]
    wanted = table.joining()[str(family)] & pair.denoisers(task)
    missing = wanted
    for _ in range(ROUNDS):
        results = pair.together(task, TOGETHER)
        for result, reference in zip(results, expected, strict=True):
            for name, value in reference.items():
                _assert_close(numbers(result[name]), numbers(value), family)
        # Since the family was loaded: a kind of call that was seen not to pay for another task is not joined again.
        missing = wanted - pair.joined(wanted, wait=any(result.timings.joined_calls for result in results))
        if not missing:
            break
    assert not missing, "the docs say that these are joined"


def test_the_docs_say_what_each_family_joins() -> None:
    assert {str(family) for family in FAMILIES if not family.needs} <= table.joining().keys()


@each_case
def test_each_callback_is_asked_as_diffusers_asks_it(pairs: Pairs, case: Case) -> None:
    family, task = case
    pair = pairs.of(family)
    call = inspect.unwrap(type(pair.local[task]).__call__)
    takes = inspect.signature(call).parameters
    # Some take the older form from their catch-all.
    older = [LEGACY] if LEGACY in takes or LEGACY in call.__code__.co_consts else []
    for name in (ON_STEP_END, *({PRIOR} & takes.keys()), *older):
        here, there = Recorder(), Recorder()
        period: dict[str, Any] = {"callback_steps": 1} if name == LEGACY else {}
        if name in takes or name == LEGACY:
            expected = pair.here(task, **period | {name: here.callback(name)})
        else:
            with here.at_steps_of(pair.local[task]):
                expected = pair.here(task)
        result = pair.there(task, batching="forbid", **period | {name: there.callback(name)})
        assert len(here.seen) == len(there.seen) > 0
        for one, other in zip(here.seen, there.seen, strict=True):
            np.testing.assert_equal(other, one)
        for field, value in expected.items():
            np.testing.assert_equal(numbers(result[field]), numbers(value))


@each_case
def test_prompts_are_encoded_as_diffusers_does(pairs: Pairs, case: Case) -> None:
    family, task = case
    pair = pairs.of(family)
    here, there = pair.local[task], pair.remote[task]
    if not hasattr(here, "encode_prompt"):
        with pytest.raises(AttributeError, match="encode_prompt"):
            there.encode_prompt("a cat")
        return
    takes = inspect.signature(here.encode_prompt).parameters
    usual = pair.arguments(task) | ENCODED
    arguments = {name: value for name, value in usual.items() if name in takes}
    with torch.no_grad():
        expected = here.encode_prompt(**arguments)
    actual = there.encode_prompt(**arguments, batching="forbid")
    np.testing.assert_equal(numbers(_listed(actual)), numbers(_listed(expected)))


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple | list) else value


def _assert_close(actual: Any, expected: Any, family: Family) -> None:
    if isinstance(expected, list):
        for one, other in zip(actual, expected, strict=True):
            _assert_close(one, other, family)
    elif isinstance(expected, np.ndarray) and expected.dtype.kind == "f":
        np.testing.assert_allclose(actual, expected, rtol=0, atol=family.tolerance)
    else:
        np.testing.assert_equal(actual, expected)

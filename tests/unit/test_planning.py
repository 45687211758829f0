"""What loads would take, told without loading, by a real worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from denoised.errors import (
    DamagedWeightsError,
    NeverFitsError,
    NotAPipelineError,
    RepoNotFoundError,
    SourceNotAllowedError,
)
from denoised_server.messages import ComponentSource, Outcome, Plan, Planned, Recipe, Spec

from tests import checkpoints
from tests.unit.worker_driver import Driver


@pytest.fixture
def driver(checkpoint_dir: Path, tmp_path: Path) -> Iterator[Driver]:
    driver = Driver(checkpoint_dir, tmp_path)
    yield driver
    driver.close()


def plan(driver: Driver, repo_id: object, **spec: Any) -> Planned:
    planned: Planned = driver.start(Plan(Recipe(Spec(str(repo_id), **spec)))).result()[-1]
    return planned


def test_a_plan_is_what_the_load_then_takes(driver: Driver, sd_checkpoint: Path) -> None:
    planned = plan(driver, sd_checkpoint, dtype="bfloat16")
    assert driver.snapshot().components == ()
    loaded = driver.load("pipelines/a", sd_checkpoint, dtype="bfloat16")
    assert {(part.role, part.class_name, part.digest, part.dtype) for part in planned.components} == {
        (part.role, part.class_name, part.digest, part.dtype) for part in loaded.components if part.digest
    }
    assert (planned.outcome, planned.shared_bytes) == (Outcome.FITS, 0)
    held = driver.snapshot().weight_bytes
    assert abs(planned.new_bytes - held) < held / 100
    assert planned.free_bytes == driver.snapshot().budget_bytes
    for part in planned.components:
        assert part.file_bytes["F32"] == pytest.approx(2 * part.weight_bytes, rel=0.02)


def test_what_is_held_already_is_shared(driver: Driver, sd_checkpoint: Path, tmp_path: Path) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    copied = plan(driver, sd_checkpoint, task="inpainting")
    assert (copied.new_bytes, copied.outcome, copied.load_seconds) == (0, Outcome.FITS, 0)
    assert all(part.is_held for part in copied.components)
    tuned = plan(driver, checkpoints.stable_diffusion(tmp_path / "tuned", seed=7))
    assert {part.role for part in tuned.components if not part.is_held} == {"unet"}
    assert tuned.new_bytes + tuned.shared_bytes == copied.shared_bytes
    assert tuned.load_seconds > 0
    mixed = plan(driver, sd_checkpoint, overrides={"unet": ComponentSource(str(tmp_path / "tuned"), subfolder="unet")})
    assert mixed.new_bytes == tuned.new_bytes


def test_a_plan_says_who_would_leave_and_nobody_does(sd_checkpoint: Path, tmp_path: Path) -> None:
    tuned = checkpoints.stable_diffusion(tmp_path / "tuned", seed=7)
    measuring = Driver(sd_checkpoint, tmp_path)
    weights = plan(measuring, sd_checkpoint).new_bytes
    unet = next(part.weight_bytes for part in plan(measuring, sd_checkpoint).components if part.role == "unet")
    measuring.close()
    driver = Driver(sd_checkpoint, tmp_path, budget=weights + unet // 2)
    try:
        driver.load("pipelines/a", sd_checkpoint)
        driver.generate("pipelines/a", prompt="a", num_inference_steps=1, height=64, width=64).result()
        before = driver.snapshot()
        planned = plan(driver, tuned)
        assert planned.outcome is Outcome.EVICTS
        assert planned.evictable_bytes > unet // 2
        assert sum(each.weight_bytes for each in planned.evicted) >= planned.new_bytes - planned.free_bytes
        assert all(each.pipelines == ("pipelines/a",) for each in planned.evicted)
        assert driver.snapshot().components == before.components
        assert driver.snapshot().reserved_bytes == 0
    finally:
        driver.close()


def test_what_never_fits_is_an_answer_and_an_error_only_for_the_load(sd_checkpoint: Path) -> None:
    driver = Driver(sd_checkpoint, budget=1_000_000)
    try:
        planned = plan(driver, sd_checkpoint)
        assert (planned.outcome, planned.evicted, planned.budget_bytes) == (Outcome.NEVER_FITS, (), 1_000_000)
        with pytest.raises(NeverFitsError) as caught:
            driver.load("pipelines/a", sd_checkpoint)
        assert {"needed_bytes", "free_bytes", "evictable_bytes", "budget_bytes"} <= caught.value.metadata.keys()
        assert int(caught.value.metadata["needed_bytes"]) == planned.new_bytes
    finally:
        driver.close()


def test_what_cannot_be_loaded_cannot_be_planned(driver: Driver, sd_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceNotAllowedError):
        plan(driver, "/etc")
    with pytest.raises(RepoNotFoundError):
        plan(driver, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotAPipelineError):
        plan(driver, tmp_path / "empty")
    damaged = checkpoints.stable_diffusion(tmp_path / "damaged")
    (weights,) = (damaged / "unet").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DamagedWeightsError):
        plan(driver, damaged)

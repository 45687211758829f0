"""Updating live pipelines: over a fake executor, and in a real worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from denoised.errors import InvalidNoiseSchedulerError, PipelineNotFoundError, WorkerLostError
from denoised_server.handles import State
from denoised_server.messages import (
    Derivation,
    Derive,
    Generate,
    Load,
    Loaded,
    NoiseScheduler,
    PipelineSettings,
    Recipe,
    Spec,
    Update,
)
from denoised_server.pool import Lease, Pool
from denoised_server.recipes import identity
from denoised_server.updates import Change
from denoised_server.views import PipelineView
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline

from tests.unit.fake_executor import FakeExecutor
from tests.unit.worker_driver import Driver, images

EULER = NoiseScheduler("EulerDiscreteScheduler")
SPEC = Spec("weights")
REQUEST: dict[str, Any] = {"prompt": "a", "num_inference_steps": 3, "height": 64, "width": 64, "forbid": True}


def noise_scheduler(scheduler: NoiseScheduler | None) -> Change:
    return Change(frozenset({"noise_scheduler"}), PipelineSettings(scheduler))


# The front-end


@pytest.fixture
def executor() -> FakeExecutor:
    return FakeExecutor()


@pytest.fixture
async def pool(executor: FakeExecutor) -> AsyncIterator[Pool]:
    pool = Pool(executor)
    await pool.start()
    yield pool
    await pool.stop()


async def load(pool: Pool, **lease: Any) -> PipelineView:
    view = [event async for event in pool.load(SPEC, Lease(**lease))][-1]
    assert isinstance(view, PipelineView)
    return view


async def run(pool: Pool, name: str) -> None:
    async for _ in pool.generate(Generate(name, {"prompt": "a cat"})):
        pass


async def test_a_pipeline_rebuilt_after_its_worker_died_is_as_it_was_set(pool: Pool, executor: FakeExecutor) -> None:
    name = (await load(pool)).name
    assert (await pool.update(name, noise_scheduler(EULER))).recipe.settings == PipelineSettings(EULER)
    executor.kill("workers/0")
    await run(pool, name)
    assert executor.sent(Load)[-1].recipe.settings == PipelineSettings(EULER)


@pytest.mark.parametrize("executor", [FakeExecutor(2)])
async def test_a_drain_waits_for_an_update_and_the_recipe_remembers_it(pool: Pool, executor: FakeExecutor) -> None:
    name = (await load(pool)).name
    await pool.drain_worker("workers/1")
    executor.hold(Update)
    update = asyncio.create_task(pool.update(name, noise_scheduler(EULER)))
    while not executor.sent(Update):  # noqa: ASYNC110 - what is waited for is another's state
        await asyncio.sleep(0.001)
    drain = asyncio.create_task(pool.drain_worker("workers/0"))
    await asyncio.sleep(0.01)
    assert not drain.done()
    executor.release()
    # No worker is left on which it could be done again.
    assert (await update).recipe.settings == PipelineSettings(EULER)
    await drain
    pool.resume_worker("workers/0")
    await run(pool, name)
    assert executor.sent(Load)[-1].recipe.settings == PipelineSettings(EULER)


async def test_a_lost_pipeline_is_brought_back_to_be_updated(pool: Pool, executor: FakeExecutor) -> None:
    name = (await load(pool)).name
    executor.kill("workers/0")
    view = await pool.update(name, noise_scheduler(EULER))
    assert (view.state, view.worker) == (State.ACTIVE, "workers/0")


async def test_handles_with_other_settings_are_not_built_as_one(pool: Pool, executor: FakeExecutor) -> None:
    one, other = (await load(pool)).name, (await load(pool)).name
    await pool.update(one, noise_scheduler(EULER))
    executor.kill("workers/0")
    executor.log.clear()
    await asyncio.gather(run(pool, one), run(pool, other))
    assert {command.pipeline: command.recipe.settings for command in executor.sent(Load)} == {
        one: PipelineSettings(EULER),
        other: PipelineSettings(),
    }


async def test_what_is_derived_starts_as_its_source_is_and_stays_so(pool: Pool, executor: FakeExecutor) -> None:
    source = (await load(pool)).name
    await pool.update(source, noise_scheduler(EULER))
    derived = await pool.derive(source, Derivation("inpainting"), Lease())
    await pool.update(source, noise_scheduler(None))
    assert executor.sent(Derive)[-1].settings == PipelineSettings(EULER)
    assert pool.get(derived.name).recipe.settings == PipelineSettings(EULER)
    assert pool.get(source).recipe.settings == PipelineSettings()


async def test_a_noise_scheduler_named_when_deriving_replaces_the_one_set_before(pool: Pool) -> None:
    source = (await load(pool)).name
    await pool.update(source, noise_scheduler(EULER))
    derived = await pool.derive(source, Derivation("inpainting", {"scheduler": None}), Lease())
    assert derived.recipe.settings == PipelineSettings()


async def test_an_update_that_fails_changes_nothing(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    name = (await load(pool)).name
    await pool.update(name, noise_scheduler(EULER))
    with pytest.raises(InvalidNoiseSchedulerError):
        await pool.update(name, noise_scheduler(NoiseScheduler("NoSuchScheduler")))
    assert pool.get(name).recipe.settings == PipelineSettings(EULER)
    assert not [record for record in caplog.records if record.exc_info], "it is no bug of the daemon's"


async def test_updates_of_one_pipeline_happen_one_after_another(pool: Pool, executor: FakeExecutor) -> None:
    name = (await load(pool)).name
    executor.hold(Update)
    first = asyncio.create_task(pool.update(name, noise_scheduler(EULER)))
    second = asyncio.create_task(pool.update(name, noise_scheduler(None)))
    await asyncio.sleep(0.01)
    assert len(executor.sent(Update)) == 1
    executor.release()
    await asyncio.gather(first, second)
    assert pool.get(name).recipe.settings == PipelineSettings()


async def test_who_leaves_an_update_leaves_it_whole(pool: Pool, executor: FakeExecutor) -> None:
    name = (await load(pool)).name
    executor.hold(Update)
    leaving = asyncio.create_task(pool.update(name, noise_scheduler(EULER)))
    await asyncio.sleep(0.01)
    leaving.cancel()
    await asyncio.wait([leaving])
    executor.release()
    await pool.update(name, Change(frozenset(), PipelineSettings()))
    assert executor.cancelled == []
    assert pool.get(name).recipe.settings == PipelineSettings(EULER)


async def test_an_update_whose_worker_dies_says_so_and_changes_nothing(pool: Pool, executor: FakeExecutor) -> None:
    name = (await load(pool)).name
    executor.hold(Update)
    update = asyncio.create_task(pool.update(name, noise_scheduler(EULER)))
    await asyncio.sleep(0.01)
    executor.kill("workers/0")
    with pytest.raises(WorkerLostError):
        await update
    assert pool.get(name).recipe.settings == PipelineSettings()


async def test_a_pipeline_that_is_not_there_cannot_be_updated(pool: Pool) -> None:
    with pytest.raises(PipelineNotFoundError):
        await pool.update("pipelines/none", noise_scheduler(EULER))


async def test_the_same_id_gets_the_same_pipeline_whatever_was_set_on_it(pool: Pool) -> None:
    name = (await load(pool, pipeline_id="painter")).name
    await pool.update(name, noise_scheduler(EULER))
    assert (await load(pool, pipeline_id="painter")).recipe.settings == PipelineSettings(EULER)


def test_settings_are_part_of_what_a_recipe_means() -> None:
    def with_config(**config: Any) -> Any:
        return identity(Recipe(SPEC, settings=PipelineSettings(NoiseScheduler("DDIMScheduler", config))))

    assert with_config(steps_offset=1) == with_config(steps_offset=1)
    assert len({with_config(steps_offset=1), with_config(steps_offset=True), identity(Recipe(SPEC))}) == 3


# The worker


@pytest.fixture
def driver(checkpoint_dir: Path, sd_checkpoint: Path) -> Iterator[Driver]:
    driver = Driver(checkpoint_dir)
    driver.load("pipelines/a", sd_checkpoint)
    yield driver
    driver.close()


def update(driver: Driver, name: str, scheduler: NoiseScheduler | None) -> Loaded:
    loaded: Loaded = driver.start(Update(name, PipelineSettings(scheduler))).result()[-1]
    return loaded


def paint(driver: Driver, name: str = "pipelines/a") -> Any:
    return images(driver.generate(name, **REQUEST).result())


def expected(local: StableDiffusionPipeline) -> Any:
    import torch

    request = {name: value for name, value in REQUEST.items() if name != "forbid"}
    return local(**request, generator=torch.Generator().manual_seed(0), output_type="np").images


def test_the_noise_scheduler_is_what_from_config_makes(driver: Driver, local: StableDiffusionPipeline) -> None:
    loaded = update(driver, "pipelines/a", EULER)
    local.scheduler = EulerDiscreteScheduler.from_config(local.scheduler.config)
    assert loaded.noise_scheduler is not None
    assert loaded.noise_scheduler.config is not None
    assert dict(loaded.noise_scheduler.config) == dict(local.scheduler.config)
    np.testing.assert_array_equal(paint(driver), expected(local))


def test_what_was_left_to_its_default_is_left_to_the_next_class_too(
    driver: Driver, local: StableDiffusionPipeline
) -> None:
    update(driver, "pipelines/a", NoiseScheduler("DPMSolverMultistepScheduler", overrides={"use_karras_sigmas": True}))
    first = update(driver, "pipelines/a", None)
    assert first.noise_scheduler is not None
    assert first.noise_scheduler.class_name == "DDIMScheduler"
    local.scheduler = DPMSolverMultistepScheduler.from_config(local.scheduler.config, use_karras_sigmas=True)
    between = update(
        driver, "pipelines/a", NoiseScheduler("DPMSolverMultistepScheduler", overrides={"use_karras_sigmas": True})
    ).noise_scheduler
    assert between is not None
    update(driver, "pipelines/a", NoiseScheduler("EulerDiscreteScheduler", between.config))
    local.scheduler = EulerDiscreteScheduler.from_config(local.scheduler.config)
    assert local.scheduler.config.use_karras_sigmas
    np.testing.assert_array_equal(paint(driver), expected(local))


def test_others_on_the_same_weights_stay_as_they_are(driver: Driver) -> None:
    driver.derive("pipelines/b", "pipelines/a", "text-to-image")
    before = paint(driver)
    weights = driver.snapshot().weight_bytes
    update(driver, "pipelines/a", EULER)
    np.testing.assert_array_equal(paint(driver, "pipelines/b"), before)
    assert not np.array_equal(paint(driver), before)
    update(driver, "pipelines/a", None)
    np.testing.assert_array_equal(paint(driver), before)
    assert driver.snapshot().weight_bytes == weights


def test_a_recipe_with_settings_builds_what_was_set(driver: Driver, sd_checkpoint: Path) -> None:
    settings = update(driver, "pipelines/a", EULER).settings
    after = paint(driver)
    driver.start(Load("pipelines/b", Recipe(Spec(str(sd_checkpoint), task="text-to-image"), (), settings))).result()
    np.testing.assert_array_equal(paint(driver, "pipelines/b"), after)


def test_a_request_may_bring_a_noise_scheduler_of_its_own(driver: Driver, local: StableDiffusionPipeline) -> None:
    before = paint(driver)
    command = Generate(
        "pipelines/a",
        {name: value for name, value in REQUEST.items() if name != "forbid"},
        seeds=(0,),
        output_type="np",
        forbid_batching=True,
        noise_scheduler=NoiseScheduler("DDIMScheduler", overrides={"timestep_spacing": "trailing"}),
    )
    own = images(driver.start(command).result())
    np.testing.assert_array_equal(paint(driver), before)
    local.scheduler = DDIMScheduler.from_config(local.scheduler.config, timestep_spacing="trailing")
    np.testing.assert_array_equal(own, expected(local))


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (NoiseScheduler("EulerDiscreetScheduler"), "Did you mean 'EulerDiscreteScheduler'"),
        (NoiseScheduler("UNet2DConditionModel"), "no noise scheduler 'UNet2DConditionModel'"),
        (NoiseScheduler("KarrasDiffusionSchedulers"), "no noise scheduler"),
        (NoiseScheduler("SchedulerMixin"), "no noise scheduler"),
        (NoiseScheduler("os.system"), "no noise scheduler"),
        (NoiseScheduler("DDIMScheduler", overrides={"beta_strat": 1.0}), "Did you mean 'beta_start'"),
        (NoiseScheduler("DDIMScheduler", {"beta_strat": 1.0}), "takes no 'beta_strat'"),
        (NoiseScheduler("DDIMScheduler", overrides={"beta_schedule": "none"}), "cannot be configured"),
        (NoiseScheduler("DDIMScheduler", overrides={"beta_start": "x"}), "cannot be configured"),
        (NoiseScheduler("DDIMScheduler", overrides={"num_train_timesteps": 10**12}), "out of range"),
        (NoiseScheduler("DDIMScheduler", overrides={"trained_betas": [0.1] * 200_000}), "200,000 elements"),
        (NoiseScheduler("DDIMScheduler", {"_class_name": 7}), "cannot be configured"),
    ],
)
def test_a_noise_scheduler_that_cannot_be_is_refused_and_nothing_changes(
    driver: Driver, wanted: NoiseScheduler, says: str
) -> None:
    before = paint(driver)
    with pytest.raises(InvalidNoiseSchedulerError, match=says):
        update(driver, "pipelines/a", wanted)
    with pytest.raises(InvalidNoiseSchedulerError, match=says):
        driver.start(Generate("pipelines/a", {"prompt": "a"}, seeds=(0,), noise_scheduler=wanted)).result()
    np.testing.assert_array_equal(paint(driver), before)

"""Components that leave the device and come back, in a real worker with a small budget."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from denoised.errors import NoRoomError, WeightsChangedError
from denoised_server.messages import Hold, Keep, Load, Recipe, Spec
from denoised_server.worker.cargo import Cargo
from denoised_server.worker.components import Held
from denoised_server.worker.tiers import Tier
from safetensors.torch import load_file, save_file

from tests import checkpoints
from tests.unit.worker_driver import Driver, images

REQUEST: dict[str, Any] = {"prompt": "red apple", "num_inference_steps": 2, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three pipelines that share all but their UNets."""
    root = tmp_path_factory.mktemp("residency")
    return [checkpoints.stable_diffusion(root / name, seed=number) for number, name in enumerate("abc")]


@pytest.fixture(scope="module")
def expected(folders: list[Path]) -> list[Any]:
    """What each of them draws with all the room that it wants."""
    driver = Driver(*folders)
    try:
        return [draw(driver, load(driver, folder)) for folder in folders]
    finally:
        driver.close()


@pytest.fixture(scope="module")
def sizes(folders: list[Path]) -> dict[str, int]:
    driver = Driver(*folders)
    try:
        return {part.role: part.weight_bytes for part in driver.load("pipelines/a", folders[0]).components}
    finally:
        driver.close()


@pytest.fixture
def driver(folders: list[Path], sizes: dict[str, int], request: pytest.FixtureRequest) -> Iterator[Driver]:
    """With room for one of the pipelines, and a little."""
    driver = Driver(*folders, budget=int(1.1 * sum(sizes.values())), **getattr(request, "param", {}))
    yield driver
    driver.close()


def load(driver: Driver, folder: Path, keep: Keep = Keep()) -> str:  # noqa: B008
    name = f"pipelines/{folder.name}"
    driver.start(Load(name, Recipe(Spec(str(folder), task="text-to-image")), keep=keep)).result()
    return name


def draw(driver: Driver, name: str, **options: Any) -> Any:
    return images(driver.generate(name, seed=3, forbid=True, **(REQUEST | options)).result())


def held(driver: Driver, name: str) -> dict[str, Held]:
    """The components of a pipeline by class."""
    return {type(each.module).__name__: each for each in driver.worker._store.all() if name in each.users}


def until(predicate: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not predicate():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize("driver", [{}, {"host_memory": 2**30}], indirect=True, ids=["disk", "host"])
def test_pipelines_that_do_not_fit_together_take_turns_and_draw_the_same_bits(
    driver: Driver, folders: list[Path], expected: list[Any]
) -> None:
    names = [load(driver, folder) for folder in folders]
    tiers = set[str]()
    for number in (0, 1, 2, 1, 0, 2):
        np.testing.assert_array_equal(draw(driver, names[number]), expected[number])
        snapshot = driver.snapshot()
        assert snapshot.weight_bytes <= snapshot.budget_bytes
        tiers |= {part.residency for part in snapshot.components}
    assert tiers == {"device", "host" if driver.worker._residency._host_bytes else "disk"}
    assert driver.worker._residency.unreclaimed_bytes == 0


def test_a_pipeline_larger_than_the_device_runs(
    folders: list[Path], sizes: dict[str, int], expected: list[Any]
) -> None:
    driver = Driver(*folders, budget=int(1.05 * sizes["unet"]))
    try:
        name = load(driver, folders[0])
        for _ in range(2):
            np.testing.assert_array_equal(draw(driver, name), expected[0])
            assert driver.snapshot().weight_bytes <= driver.snapshot().budget_bytes
    finally:
        driver.close()


def test_requests_of_pipelines_that_do_not_fit_together_all_end(
    driver: Driver, folders: list[Path], expected: list[Any]
) -> None:
    names = [load(driver, folder) for folder in folders]
    options = {**REQUEST, "num_inference_steps": 2}
    running = [(number, driver.generate(names[number], seed=3, forbid=True, **options)) for number in (0, 1, 2) * 3]
    for number, each in running:
        np.testing.assert_array_equal(images(each.result()), expected[number])


def test_what_is_away_is_brought_back_by_whoever_uses_it(driver: Driver, folders: list[Path]) -> None:
    names = [load(driver, folder) for folder in folders[:2]]
    draw(driver, names[0])
    draw(driver, names[1])
    unet = held(driver, names[0])["UNet2DConditionModel"]
    assert unet.tier is Tier.DISK
    module: Any = unet.module
    stored = load_file(folders[0] / "unet" / "diffusion_pytorch_model.safetensors")
    # Looking does not bring it.
    assert (module.dtype, module.device.type) == (torch.float32, "cpu")
    assert [tuple(weight.shape) for weight in module.parameters()]
    assert unet.tier is Tier.DISK
    assert torch.equal(module.conv_in.weight, stored["conv_in.weight"])
    assert str(unet.tier) == "device"
    draw(driver, names[1])
    assert unet.tier is Tier.DISK
    assert torch.equal(module.half().conv_in.weight, stored["conv_in.weight"].half())


def test_weights_that_are_tied_stay_tied(driver: Driver, folders: list[Path]) -> None:
    names = [load(driver, folder) for folder in folders[:2]]
    before = {each.digest: list(each.module.parameters()) for each in driver.worker._store.all()}
    for name in (*names, *names):
        draw(driver, name)
    for each in driver.worker._store.all():
        now = list(each.module.parameters())
        assert all(one is other for one, other in zip(now, before[each.digest], strict=True))


@pytest.mark.parametrize("driver", [{}, {"host_memory": 2**30}], indirect=True, ids=["disk", "host"])
def test_an_idle_pipeline_leaves_after_its_keep_alive_and_is_back_when_it_is_used(
    driver: Driver, folders: list[Path], expected: list[Any], sizes: dict[str, int]
) -> None:
    name = load(driver, folders[0], Keep(keep_alive=0.0))
    np.testing.assert_array_equal(draw(driver, name), expected[0])
    below = "host" if driver.worker._residency._host_bytes else "disk"
    until(lambda: {part.residency for part in driver.snapshot().components} == {below})
    assert driver.snapshot().weight_bytes < 0.01 * sum(sizes.values())
    np.testing.assert_array_equal(draw(driver, name), expected[0])
    until(lambda: {part.residency for part in driver.snapshot().components} == {below})
    assert driver.worker._residency.unreclaimed_bytes == 0
    driver.start(Hold(name, Keep())).result()
    draw(driver, name)
    assert "device" in {part.residency for part in driver.snapshot().components}


def test_what_is_pinned_never_leaves(driver: Driver, folders: list[Path], sizes: dict[str, int]) -> None:
    pinned = load(driver, folders[0], Keep(pinned=True))
    with pytest.raises(NoRoomError) as caught:
        load(driver, folders[1])
    assert int(caught.value.metadata["evictable_bytes"]) == 0
    assert {part.residency for part in driver.snapshot().components} == {"device"}
    driver.start(Hold(pinned, Keep())).result()
    name = load(driver, folders[1])
    draw(driver, name)
    driver.start(Hold(name, Keep(pinned=True))).result()
    with pytest.raises(NoRoomError, match="pinned"):
        driver.start(Hold(pinned, Keep(pinned=True))).result()


def test_weights_whose_file_has_changed_are_not_taken_for_those_that_were_loaded(
    tmp_path: Path, folders: list[Path], expected: list[Any], sizes: dict[str, int]
) -> None:
    changing = checkpoints.stable_diffusion(tmp_path / "changing", seed=11)
    driver = Driver(changing, *folders, budget=int(1.1 * sum(sizes.values())))
    try:
        names = [load(driver, changing), load(driver, folders[0])]
        for name in names:
            draw(driver, name)
        assert held(driver, names[0])["UNet2DConditionModel"].tier is Tier.DISK
        file = changing / "unet" / "diffusion_pytorch_model.safetensors"
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        with pytest.raises(WeightsChangedError):
            draw(driver, names[0])
        np.testing.assert_array_equal(draw(driver, names[1]), expected[0])
        driver.unload(names[0])
        draw(driver, load(driver, changing))
    finally:
        driver.close()


def test_a_live_pipeline_draws_from_its_files_until_its_weights_are_its_own(
    tmp_path: Path, folders: list[Path], expected: list[Any]
) -> None:
    folder = tmp_path / "a"
    shutil.copytree(folders[0], folder)
    driver = Driver(folder)
    try:
        residency = driver.worker._residency
        of_engine, residency.is_changed = residency.is_changed, lambda module: True
        name = load(driver, folder)
        np.testing.assert_array_equal(draw(driver, name), expected[0])
        assert str(folder) in Path("/proc/self/maps").read_text()
        residency.is_changed = of_engine
        until(lambda: residency.is_settled)
        assert str(folder) not in Path("/proc/self/maps").read_text()
        for file in folder.rglob("*.safetensors"):
            file.write_bytes(b"")
        np.testing.assert_array_equal(draw(driver, name), expected[0])
    finally:
        driver.close()


def test_a_component_that_leaves_and_returns_while_it_is_copied_has_its_weights(
    folders: list[Path], expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(folders[0])
    fill, moved = Cargo.fill, set[Cargo]()

    def disturbed(cargo: Cargo, buffer: torch.Tensor) -> Iterator[None]:
        for number, _ in enumerate(fill(cargo, buffer)):
            if number == 0 and cargo not in moved:
                moved.add(cargo)
                residency.evict_idle(1 << 40)
                # Looking at a weight brings it back.
                assert not cargo.tensors[0].isnan().any()
            yield

    try:
        residency = driver.worker._residency
        monkeypatch.setattr(Cargo, "fill", disturbed)
        name = load(driver, folders[0])
        until(lambda: residency.is_settled)
        assert moved
        np.testing.assert_array_equal(draw(driver, name), expected[0])
    finally:
        driver.close()


def test_what_cannot_be_read_again_stays(driver: Driver, folders: list[Path], sizes: dict[str, int]) -> None:
    name = load(driver, folders[0])
    # What is changed during the copy out of the files would be half lost; nothing but this test changes weights there.
    until(lambda: driver.worker._residency.is_settled)
    for each in held(driver, name).values():
        for weight in each.module.parameters():
            weight.data += 1.0
    with pytest.raises(NoRoomError):
        draw(driver, load(driver, folders[1]))
    assert {part.residency for part in driver.snapshot().components if name in part.pipelines} == {"device"}

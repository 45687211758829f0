"""Commands to a real worker."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from denoised import media
from denoised.errors import (
    DamagedWeightsError,
    InternalError,
    InvalidFieldError,
    InvalidMediaError,
    NeverFitsError,
    NotAPipelineError,
    PipelineNotFoundError,
    PipelineRejectedError,
    RepoNotFoundError,
    SourceNotAllowedError,
    TaskNotSupportedError,
)
from denoised.values import Artifact
from denoised_server.messages import ComponentSource, Generate, Load, LoadProgress, Progress, Recipe, Spec
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from tests import checkpoints
from tests.unit.worker_driver import Driver, finished, images

SIZE: dict[str, Any] = {"height": 64, "width": 64}
PICTURE = Image.new("RGB", (64, 64), (200, 80, 20))


@pytest.fixture
def driver(checkpoint_dir: Path, tmp_path: Path) -> Iterator[Driver]:
    driver = Driver(checkpoint_dir, tmp_path)
    yield driver
    driver.close()


def test_loading_reports_progress_and_ends_with_the_pipeline(driver: Driver, sd_checkpoint: Path) -> None:
    events = driver.start(Load("pipelines/a", Recipe(Spec(str(sd_checkpoint), task="text-to-image")))).result()
    reports = [event for event in events if isinstance(event, LoadProgress)]
    assert {"unet", "vae", "text_encoder"} <= {report.role for report in reports}
    assert reports[-1].completed_bytes == reports[-1].total_bytes > 0
    loaded = events[-1]
    assert (loaded.task, loaded.pipeline_class) == ("text-to-image", "StableDiffusionPipeline")
    held = {component.role: component.weight_bytes for component in loaded.components}
    reference = StableDiffusionPipeline.from_pretrained(sd_checkpoint)
    for role in ("unet", "vae"):
        expected = sum(p.numel() * 4 for p in getattr(reference, role).parameters())
        assert held[role] == expected
    assert held["tokenizer"] == held["scheduler"] == 0


def test_deriving_and_loading_again_take_no_bytes(driver: Driver, sd_checkpoint: Path) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    before = driver.snapshot().weight_bytes
    driver.derive("pipelines/b", "pipelines/a", "image-to-image")
    driver.derive("pipelines/c", "pipelines/b", "inpainting")
    driver.load("pipelines/d", sd_checkpoint)
    snapshot = driver.snapshot()
    assert snapshot.weight_bytes == before
    assert all(len(component.pipelines) == 4 for component in snapshot.components)
    assert [driver.unload(f"pipelines/{name}") for name in "abc"] == [0, 0, 0]
    assert driver.unload("pipelines/d") == before
    assert driver.snapshot().weight_bytes == 0


def test_checkpoints_share_what_has_the_same_content(driver: Driver, sd_checkpoint: Path, tmp_path: Path) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    before = driver.snapshot().weight_bytes
    other = driver.load("pipelines/b", checkpoints.stable_diffusion(tmp_path / "other", seed=7))
    unet = next(component for component in other.components if component.role == "unet")
    assert driver.snapshot().weight_bytes - before == unet.weight_bytes
    images_of = [
        images(driver.generate(f"pipelines/{name}", **SIZE, prompt="a", num_inference_steps=2).result())
        for name in "ab"
    ]
    assert not np.allclose(*images_of, atol=1e-3)  # type: ignore[misc]


def test_two_dtypes_are_two_components(driver: Driver, sd_checkpoint: Path) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    driver.load("pipelines/b", sd_checkpoint, dtype="bfloat16")
    assert len(driver.snapshot().components) == 6


def test_a_changed_checkpoint_is_read_anew(driver: Driver, tmp_path: Path) -> None:
    folder = checkpoints.stable_diffusion(tmp_path / "sd", seed=1)
    first = driver.load("pipelines/a", folder)
    checkpoints.stable_diffusion(folder, seed=2)
    second = driver.load("pipelines/b", folder)
    digests = [{part.role: part.digest for part in loaded.components} for loaded in (first, second)]
    assert digests[0]["unet"] != digests[1]["unet"]
    assert digests[0]["vae"] == digests[1]["vae"]


def test_weights_stay_as_they_are_when_their_file_does_not(driver: Driver, tmp_path: Path) -> None:
    folder = checkpoints.stable_diffusion(tmp_path / "sd")
    driver.load("pipelines/a", folder)
    request: dict[str, Any] = {"prompt": "a", "num_inference_steps": 2, "forbid": True, **SIZE}
    before = images(driver.generate("pipelines/a", **request).result())
    for weights in folder.glob("*/*.safetensors"):
        with weights.open("r+b") as file:
            file.truncate(100)
    np.testing.assert_array_equal(images(driver.generate("pipelines/a", **request).result()), before)


def test_a_component_from_elsewhere_and_none_at_all(driver: Driver, sd_checkpoint: Path, tmp_path: Path) -> None:
    other = checkpoints.stable_diffusion(tmp_path / "other", seed=7)
    plain = driver.load("pipelines/a", other)
    mixed = driver.load(
        "pipelines/b",
        sd_checkpoint,
        overrides={
            "unet": ComponentSource(str(other), subfolder="unet"),
            "safety_checker": None,
            "requires_safety_checker": False,
        },
    )
    unets = [next(part for part in loaded.components if part.role == "unet") for loaded in (plain, mixed)]
    assert unets[0].digest == unets[1].digest


def test_cancelling_stops_within_a_step(driver: Driver, sd_checkpoint: Path) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    running = driver.generate("pipelines/a", prompt="a", **SIZE, num_inference_steps=900)
    while not isinstance(running.next(), Progress):
        pass
    calls = driver.snapshot().calls
    running.cancel()
    events = running.result()
    assert all(isinstance(event, Progress) for event in events)
    assert driver.snapshot().calls <= calls + len(events) + 2


def test_a_load_that_is_cancelled_leaves_nothing(driver: Driver, sd_checkpoint: Path) -> None:
    running = driver.start(Load("pipelines/a", Recipe(Spec(str(sd_checkpoint), task="text-to-image"))))
    running.cancel()
    running.result()
    snapshot = driver.snapshot()
    assert (snapshot.weight_bytes, snapshot.reserved_bytes, snapshot.components) == (0, 0, ())
    driver.load("pipelines/a", sd_checkpoint)


def test_loading_beside_requests_changes_no_bit(driver: Driver, sd_checkpoint: Path, sdxl_checkpoint: Path) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    request: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 30, "forbid": True, **SIZE}
    expected = images(driver.generate("pipelines/a", **request).result())
    stop, failures = threading.Event(), []

    def load() -> None:
        while not stop.is_set():
            try:
                driver.load("pipelines/x", sdxl_checkpoint, dtype="float16")
                driver.unload("pipelines/x")
            except Exception as error:
                failures.append(error)
                return

    loading = threading.Thread(target=load)
    loading.start()
    try:
        for _ in range(4):
            np.testing.assert_array_equal(images(driver.generate("pipelines/a", **request).result()), expected)
    finally:
        stop.set()
        loading.join()
    assert not failures
    assert torch.get_default_dtype() == torch.float32


def test_one_request_that_fails_fails_alone(driver: Driver, sd_checkpoint: Path) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    good = [driver.generate("pipelines/a", prompt="a", **SIZE, num_inference_steps=5, seed=index) for index in range(3)]
    bad = driver.generate("pipelines/a", **SIZE, num_inference_steps=5, prompt_embeds=torch.zeros(1, 77, 31))
    with pytest.raises(Exception, match=r"failed|refused"):
        bad.result()
    assert all(finished(each.result()).calls for each in good)


def test_a_joined_call_that_runs_out_of_memory_is_run_one_by_one(driver: Driver, sd_checkpoint: Path) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    request: dict[str, Any] = {"prompt": "a", "num_inference_steps": 8, **SIZE}
    expected = [images(driver.generate("pipelines/a", seed=seed, **request).result()) for seed in range(4)]
    layer = driver.worker._pipelines["pipelines/a"].pipeline.unet.conv_in
    failures: list[int] = []
    forward = layer.forward

    def exhausted(sample: torch.Tensor) -> Any:
        if sample.shape[0] > 2 and len(failures) < 3:
            failures.append(sample.shape[0])
            raise torch.OutOfMemoryError("injected")
        return forward(sample)

    layer.forward = exhausted
    running = [driver.generate("pipelines/a", seed=seed, **request) for seed in range(4)]
    for each, image in zip(running, expected, strict=True):
        np.testing.assert_allclose(images(each.result()), image, atol=1e-4)
    assert len(failures) == 3


def test_an_unload_right_after_a_cancel_stops_the_run_and_frees_its_weights(
    driver: Driver, sd_checkpoint: Path
) -> None:
    for _ in range(3):
        driver.load("pipelines/a", sd_checkpoint)
        unet = weakref.ref(driver.worker._pipelines["pipelines/a"].pipeline.unet)
        held = driver.snapshot().weight_bytes
        running = driver.generate("pipelines/a", prompt="a", num_inference_steps=900, **SIZE)
        running.next()
        before = driver.snapshot().calls
        running.cancel()
        assert driver.unload("pipelines/a") == held
        assert driver.snapshot().calls <= before + 3
        assert unet() is None
        running.result()


def test_a_failed_load_keeps_nothing_in_memory(
    driver: Driver, sd_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    original = UNet2DConditionModel.from_config

    # diffusers takes components in an order that changes from process to process: a damaged file of another one might
    # end the load before there is a UNet.
    def failing(*args: Any, **kwargs: Any) -> Any:
        model = original(*args, **kwargs)  # a local: whoever keeps the error keeps it
        made.append(weakref.ref(model))
        raise OSError("no more files can be opened")

    monkeypatch.setattr(UNet2DConditionModel, "from_config", failing)
    with pytest.raises(NotAPipelineError):
        driver.load("pipelines/a", sd_checkpoint)
    assert made[0]() is None


class Panic(BaseException):
    """As Rust libraries raise them."""


def test_a_panic_ends_its_command_and_nothing_else(
    driver: Driver, sd_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    request: dict[str, Any] = {"prompt": "a", "num_inference_steps": 2, **SIZE}
    layer = driver.worker._pipelines["pipelines/a"].pipeline.unet.conv_in

    def panic(*args: Any, **kwargs: Any) -> Any:
        raise Panic("injected")

    for target, name in ((layer, "forward"), (media, "unpack")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, panic)
            running = driver.generate("pipelines/a", **request)
            with pytest.raises(InternalError):
                running.result()
        assert finished(driver.generate("pipelines/a", **request).result()).calls
    monkeypatch.setattr("denoised_server.worker.checkpoint._read_index", panic)
    with pytest.raises(InternalError):
        driver.load("pipelines/b", sd_checkpoint)


def test_late_cancels_are_forgotten(driver: Driver, sd_checkpoint: Path) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    running = driver.generate("pipelines/a", prompt="a", num_inference_steps=2, **SIZE)
    running.result()
    running.cancel()
    assert not driver.worker._tasks


def test_equal_requests_join_at_every_component(driver: Driver, sd_checkpoint: Path) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    for _ in range(2):
        running = [
            driver.generate("pipelines/a", prompt=f"a {seed}", seed=seed, num_inference_steps=6, **SIZE)
            for seed in range(4)
        ]
        costs = [finished(each.result()) for each in running]
    assert all(cost.joined_calls == cost.calls for cost in costs), "text encoder, UNet and VAE"


def test_a_component_from_elsewhere_is_the_class_that_it_says(
    driver: Driver, sd_checkpoint: Path, sdxl_checkpoint: Path
) -> None:
    source = ComponentSource(str(sdxl_checkpoint), subfolder="text_encoder_2")
    mixed = driver.load("pipelines/a", sd_checkpoint, overrides={"text_encoder": source})
    classes = {part.role: part.class_name for part in mixed.components}
    assert classes["text_encoder"] == "CLIPTextModelWithProjection"
    whole = driver.load("pipelines/b", sdxl_checkpoint)
    digests = {part.role: part.digest for part in whole.components}
    assert digests["text_encoder_2"] in {part.digest for part in mixed.components}
    assert driver.generate("pipelines/b", prompt="a", num_inference_steps=2, **SIZE).result()


def test_a_budget_counts_components_from_elsewhere(checkpoint_dir: Path, sd_checkpoint: Path, tmp_path: Path) -> None:
    other = checkpoints.stable_diffusion(tmp_path / "other", seed=7)
    overrides = {role: ComponentSource(str(other), subfolder=role) for role in ("unet", "vae")}
    driver = Driver(checkpoint_dir, tmp_path, budget=1_000_000)
    try:
        with pytest.raises(NeverFitsError):
            driver.load("pipelines/a", sd_checkpoint, overrides=overrides)
        assert driver.snapshot().weight_bytes == 0
    finally:
        driver.close()


def test_the_same_content_in_two_roles_is_one_component(driver: Driver, sdxl_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sdxl_checkpoint, tmp_path / "xl")
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(folder / "text_encoder_2", folder / "text_encoder")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = index["text_encoder_2"]
    (folder / "model_index.json").write_text(json.dumps(index))
    loaded = driver.load("pipelines/a", folder)
    digests = {part.role: part.digest for part in loaded.components}
    assert digests["text_encoder"] == digests["text_encoder_2"]
    assert len(driver.snapshot().components) == 3
    assert driver.snapshot().weight_bytes == sum(each.weight_bytes for each in driver.snapshot().components)


BAD_SOURCES = {
    "outside": (lambda path: "/etc", SourceNotAllowedError),
    "dots": (lambda path: f"{path}/../../../etc", SourceNotAllowedError),
    "missing": (lambda path: f"{path}/nothing", RepoNotFoundError),
    "not a pipeline": (lambda path: str(path), NotAPipelineError),
    "no such repository": (lambda path: "nobody/nothing", RepoNotFoundError),
    "nonsense": (lambda path: "a b c", InvalidFieldError),
    "empty": (lambda path: "", InvalidFieldError),
}


@pytest.mark.parametrize(("source", "error"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_bad_sources(driver: Driver, tmp_path: Path, source: Callable[[Path], str], error: type[Exception]) -> None:
    with pytest.raises(error):
        driver.load("pipelines/a", source(tmp_path))
    assert driver.snapshot().components == ()


def test_a_link_out_of_the_allowed_directories_is_no_way_out(driver: Driver, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(SourceNotAllowedError):
        driver.load("pipelines/a", tmp_path / "link")


def test_links_inside_a_checkpoint_lead_nowhere_else(
    driver: Driver, sd_checkpoint: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = checkpoints.stable_diffusion(tmp_path_factory.mktemp("outside"), seed=3)
    folder = shutil.copytree(sd_checkpoint, tmp_path / "sd")
    shutil.rmtree(folder / "unet")
    (folder / "unet").symlink_to(outside / "unet")
    with pytest.raises(SourceNotAllowedError):
        driver.load("pipelines/a", folder)


def test_a_readme_cannot_name_a_directory_outside(
    driver: Driver, sd_checkpoint: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    folder = shutil.copytree(sd_checkpoint, tmp_path / "sd")
    (folder / "README.md").write_text(f"---\nprior:\n  - {outside}\n---\n")
    with pytest.raises(SourceNotAllowedError):
        driver.load("pipelines/a", folder)


def test_a_digest_is_not_believed_by_its_file_name(driver: Driver, sd_checkpoint: Path, tmp_path: Path) -> None:
    """Whoever writes into an allowed directory must not get weights into other people's pipelines."""
    fake = checkpoints.stable_diffusion(tmp_path / "fake", seed=5)
    genuine = (sd_checkpoint / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    weights = fake / "unet" / "diffusion_pytorch_model.safetensors"
    blob = fake / "blobs" / hashlib.sha256(genuine).hexdigest()
    blob.parent.mkdir()
    weights.rename(blob)
    weights.symlink_to(blob)
    digests = [
        {part.role: part.digest for part in driver.load(f"pipelines/{name}", folder).components}["unet"]
        for name, folder in (("a", fake), ("b", sd_checkpoint))
    ]
    assert digests[0] != digests[1]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a configuration that is none": lambda folder: (folder / "unet" / "config.json").write_text("{"),
    "a configuration that is a list": lambda folder: (folder / "vae" / "config.json").write_text("[]"),
    "an index entry of one": lambda folder: (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers"]})
    ),
    "a header without shapes": lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(
        (2).to_bytes(8, "little") + b"[]"
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_malformed_checkpoints_are_no_bug_of_the_daemon(
    driver: Driver, sd_checkpoint: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    folder = shutil.copytree(sd_checkpoint, tmp_path / "a folder" / "sd")
    damage(folder)
    with pytest.raises((NotAPipelineError, DamagedWeightsError)) as caught:
        driver.load("pipelines/a", folder)
    assert str(tmp_path) not in str(caught.value).replace(str(folder), "")


@pytest.mark.parametrize("name", ["~nosuchuser/x", "/" + "x" * 300, "loop"])
def test_paths_that_cannot_be_are_answered(driver: Driver, tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises((RepoNotFoundError, SourceNotAllowedError)):
        driver.load("pipelines/a", tmp_path / name if name == "loop" else name)


def test_truncated_weights_are_told_apart_before_anything_is_read(driver: Driver, tmp_path: Path) -> None:
    folder = checkpoints.stable_diffusion(tmp_path / "sd")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DamagedWeightsError, match=r"unet/diffusion_pytorch_model\.safetensors"):
        driver.load("pipelines/a", folder)
    weights.write_bytes(b"not weights at all")
    with pytest.raises(DamagedWeightsError):
        driver.load("pipelines/a", folder)
    assert driver.snapshot().reserved_bytes == 0


def test_a_damaged_index_and_an_unknown_class(driver: Driver, tmp_path: Path) -> None:
    folder = checkpoints.stable_diffusion(tmp_path / "sd")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text("{")
    with pytest.raises(NotAPipelineError):
        driver.load("pipelines/a", folder)
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "NoSuchPipeline"}))
    with pytest.raises(TaskNotSupportedError):
        driver.load("pipelines/a", folder)


def test_a_task_that_the_family_lacks(driver: Driver, tmp_path: Path) -> None:
    folder = checkpoints.stable_diffusion(tmp_path / "sd")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "LuminaPipeline"}))
    with pytest.raises(TaskNotSupportedError):
        driver.load("pipelines/a", folder, task="inpainting")


def test_unknown_overrides_and_dtypes(driver: Driver, sd_checkpoint: Path) -> None:
    with pytest.raises(InvalidFieldError, match="safety_checker"):
        driver.load("pipelines/a", sd_checkpoint, overrides={"safty_checker": None})
    with pytest.raises(InvalidFieldError):
        driver.load("pipelines/a", sd_checkpoint, dtype="int8")


def test_weights_over_the_budget_are_refused_before_they_are_read(checkpoint_dir: Path, sd_checkpoint: Path) -> None:
    driver = Driver(checkpoint_dir, budget=1_000_000)
    try:
        memory = psutil.Process().memory_info().rss
        with pytest.raises(NeverFitsError):
            driver.load("pipelines/a", sd_checkpoint)
        assert psutil.Process().memory_info().rss - memory < 3_000_000
        assert driver.snapshot().reserved_bytes == 0
    finally:
        driver.close()


BAD_ARGUMENTS = {
    "not an image": ({"image": Artifact("image/png", b"nonsense")}, InvalidMediaError),
    "another mask": ({"image": PICTURE, "mask_image": PICTURE.resize((32, 32))}, InvalidFieldError),
    "short tensor": ({"latents": Artifact("application/x-tensor", b"123", "float32", (2,))}, InvalidMediaError),
    "not a multiple of 8": ({"height": 63, "width": 64}, PipelineRejectedError),
    "both prompts": ({"prompt_embeds": np.zeros((1, 77, 32), "float32")}, PipelineRejectedError),
}


@pytest.mark.parametrize(("arguments", "error"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(driver: Driver, sd_checkpoint: Path, arguments: dict[str, Any], error: type[Exception]) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    driver.derive("pipelines/b", "pipelines/a", "inpainting")
    mask = PICTURE.convert("L")
    good: dict[str, Any] = {
        "prompt": "a cat",
        "image": PICTURE,
        "mask_image": mask,
        "num_inference_steps": 4,
        "seed": 1,
    }
    before = images(driver.generate("pipelines/b", **good).result())
    with pytest.raises(error) as caught:
        driver.generate("pipelines/b", **(good | arguments)).result()
    assert "/" not in str(caught.value) or "image/" in str(caught.value) or "application/" in str(caught.value)
    np.testing.assert_array_equal(images(driver.generate("pipelines/b", **good).result()), before)


def test_generators_come_back_advanced(driver: Driver, sd_checkpoint: Path) -> None:
    driver.load("pipelines/a", sd_checkpoint)
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state().numpy().tobytes()
    command = Generate(
        "pipelines/a", {"prompt": "a", **SIZE, "num_inference_steps": 2}, generators=(("cpu", state),), output_type="np"
    )
    ((device, advanced),) = finished(driver.start(command).result()).generators
    torch.randn((1, 4, 8, 8), generator=generator)
    assert device == "cpu"
    assert advanced == generator.get_state().numpy().tobytes()


def test_an_unknown_pipeline_is_not_found(driver: Driver) -> None:
    with pytest.raises(PipelineNotFoundError):
        driver.generate("pipelines/none", prompt="a").result()

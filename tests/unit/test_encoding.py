"""Outputs: made later and elsewhere, each on its way as soon as it is there, and the same as ever."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from denoised import media
from denoised.values import Artifact
from denoised_server.messages import Event, Finished, Generate, Output
from denoised_server.worker import pictures
from denoised_server.worker.delivery import Delivery
from denoised_server.worker.encoding import Encoding
from denoised_server.worker.pictures import Picture
from diffusers import StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor
from PIL import Image

from tests.unit.worker_driver import Driver

SUMMARY = Finished(0.0, 0.0, 0.0, 0, 0, 0)


@dataclass
class Result:
    """As a pipeline of diffusers returns it."""

    images: Any
    nsfw_content_detected: list[bool] | None = None


class Pipeline:
    """As much of a pipeline as matters here."""

    def __init__(self, processor: Any) -> None:
        self.image_processor = processor

    def __call__(self) -> None:
        pass


def deferring(processor: Any) -> Any:
    pipeline: Any = Pipeline(processor)
    return pictures.defer(pipeline)["image_processor"]


def encoding(images: Any, **command: Any) -> Encoding:
    pipeline: Any = Pipeline(None)
    return Encoding(Result(images, [False]), Generate("pipelines/a", {}, **command), pipeline, {})


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("flags", [None, [True, False]])
def test_a_picture_that_is_made_later_is_the_one_that_diffusers_makes(channels: int, flags: list[bool] | None) -> None:
    decoded = torch.rand(2, channels, 130, 140) * 2.4 - 1.2
    processor = VaeImageProcessor()
    expected = processor.postprocess(decoded, "pil", flags)
    actual = deferring(processor).postprocess(decoded, output_type="pil", do_denormalize=flags)
    assert all(isinstance(image, Picture) for image in actual)
    assert [(image.mode, image.size) for image in actual] == [(image.mode, image.size) for image in expected]
    assert all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    "look",
    [
        lambda image: image.tobytes(),
        lambda image: image.copy().tobytes(),
        lambda image: image.convert("L").tobytes(),
        lambda image: image.resize((5, 5)).tobytes(),
        lambda image: image.crop((1, 2, 60, 70)).tobytes(),
        lambda image: image.getpixel((7, 9)),
        lambda image: image.load()[7, 9],
        lambda image: np.asarray(image).tobytes(),
        lambda image: media.pack_image(image, "image/png").data,
        lambda image: media.pack_image(image, "image/jpeg").data,
        lambda image: media.pack_image(image, "image/webp").data,
        lambda image: media.pack_image(image, "application/x-ndarray").data,
    ],
)
def test_whoever_looks_at_it_first_finds_it_whole(look: Any) -> None:
    made = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8))
    assert look(Picture("RGB", (90, 80), lambda: made)) == look(made)


def test_small_pictures_and_other_forms_are_made_at_once() -> None:
    processor = deferring(VaeImageProcessor())
    small, large = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 130, 130)
    assert type(processor.postprocess(small, output_type="pil")[0]) is Image.Image
    assert isinstance(processor.postprocess(large, output_type="np"), np.ndarray)
    assert torch.equal(processor.postprocess(large, output_type="latent"), large)


def test_videos_are_made_of_such_pictures_too() -> None:
    video = torch.rand(1, 3, 2, 130, 140)
    processor = VideoProcessor()
    ((first, second),) = deferring(processor).postprocess_video(video, output_type="pil")
    ((expected, _),) = processor.postprocess_video(video, output_type="pil")
    assert np.array_equal(np.asarray(first), np.asarray(expected))
    assert isinstance(second, Picture)


def test_each_picture_is_a_job_of_its_own_with_its_size_and_seed() -> None:
    jobs = encoding([Image.new("RGB", (3, 2)), Image.new("RGB", (5, 4))], seeds=(7, 8)).jobs
    outputs = [output for job in jobs for output in job()]
    assert [(each.index, each.width, each.height, each.seed) for each in outputs] == [(0, 3, 2, 7), (1, 5, 4, 8)]


@pytest.mark.parametrize(
    ("images", "media_type", "is_light"),
    [
        ([Image.new("RGB", (64, 64))], "application/x-ndarray", True),
        ([Image.new("RGB", (64, 64))], "image/png", True),
        ([Image.new("RGB", (256, 256))], "image/png", False),
        ([Image.new("RGB", (2048, 2048))], "application/x-ndarray", False),
        ([Picture("RGB", (64, 64), lambda: Image.new("RGB", (64, 64)))], "application/x-ndarray", True),
        ([Picture("RGB", (256, 256), lambda: Image.new("RGB", (256, 256)))], "application/x-ndarray", False),
        (np.zeros((1, 8, 8, 3)), "image/png", True),
        (np.zeros((1, 512, 512, 3)), "image/png", False),
    ],
)
def test_only_what_takes_no_time_stays_on_the_engines_thread(images: Any, media_type: str, is_light: bool) -> None:
    assert encoding(images, media_type=media_type).is_light == is_light


# Delivery


class Sent:
    """Takes what a delivery sends."""

    def __init__(self) -> None:
        self.outputs: list[int] = []
        self.last: list[Event] = []
        self.error: BaseException | None = None
        self.ended = threading.Event()

    def emit(self, *outputs: Output) -> None:
        assert not self.ended.is_set()
        self.outputs += [output.index for output in outputs]

    def end(self, error: BaseException | None, *last: Event) -> None:
        assert not self.ended.is_set()
        self.error, self.last = error, list(last)
        self.ended.set()


def delivery(sent: Sent, *jobs: Any, check: Any = lambda: None) -> Delivery:
    return Delivery(jobs, check=check, emit=sent.emit, end=sent.end, summary=lambda seconds: SUMMARY)


def made(index: int) -> list[Output]:
    return [Output("images", index, Artifact("image/png", b""))]


def test_what_is_made_first_leaves_first_and_the_last_leaves_with_the_summary() -> None:
    sent, gate = Sent(), threading.Event()

    def slow() -> list[Output]:
        assert gate.wait(10)
        return made(0)

    with ThreadPoolExecutor(2) as pool:
        delivery(sent, slow, lambda: made(1)).start(pool)
        pool.submit(gate.set)
        assert sent.ended.wait(10)
    assert sent.outputs == [1]
    assert sent.last == [*made(0), SUMMARY]


@pytest.mark.parametrize("runs_here", [False, True])
def test_one_that_fails_ends_it_once_and_the_rest_is_left_out(runs_here: bool) -> None:
    sent, ran = Sent(), list[int]()

    def fails() -> list[Output]:
        raise ValueError("broken")

    def runs() -> list[Output]:
        ran.append(1)
        return made(1)

    work = delivery(sent, fails, runs, runs)
    with ThreadPoolExecutor(1) as pool:
        if runs_here:
            work.run()
        else:
            work.start(pool)
        assert sent.ended.wait(10)
    assert isinstance(sent.error, ValueError)
    assert sent.outputs == ran == []


def test_of_one_that_is_cancelled_nothing_more_is_encoded() -> None:
    sent, ran = Sent(), list[int]()

    def check() -> None:
        if ran:
            raise KeyboardInterrupt

    def runs() -> list[Output]:
        ran.append(1)
        return made(len(ran))

    with ThreadPoolExecutor(1) as pool:
        delivery(sent, runs, runs, runs, check=check).start(pool)
        assert sent.ended.wait(10)
    assert isinstance(sent.error, KeyboardInterrupt)
    assert ran == [1]


def test_without_any_output_it_ends_at_once() -> None:
    sent, others = Sent(), Sent()
    delivery(sent).run()
    with ThreadPoolExecutor(1) as pool:
        delivery(others).start(pool)
    assert sent.last == others.last == [SUMMARY]


# Whole


def test_large_pictures_have_the_bits_of_diffusers_and_come_one_by_one(
    checkpoint_dir: Path, sd_checkpoint: Path, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 1, "num_images_per_prompt": 3}
    size = {"height": 136, "width": 136}
    pipeline = StableDiffusionPipeline.from_pretrained(sd_checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(**arguments, **size, generator=torch.Generator().manual_seed(3)).images
    driver = Driver(checkpoint_dir, tmp_path)
    try:
        driver.load("pipelines/a", sd_checkpoint)
        command = Generate("pipelines/a", arguments | size, seeds=(3,), forbid_batching=True)
        events = driver.start(command).result()
    finally:
        driver.close()
    assert [type(event) for event in events[-4:]] == [Output, Output, Output, Finished]
    outputs = sorted((event for event in events if isinstance(event, Output)), key=lambda output: output.index)
    assert [output.width for output in outputs] == [136, 136, 136]
    for output, image in zip(outputs, expected, strict=True):
        assert np.array_equal(np.asarray(media.unpack(output.artifact)), np.asarray(image))

"""Sounds and videos as files, and lists of lists of images, through a daemon."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import denoised
import diffusers
import numpy as np
import pytest
import torch
from denoised.errors import InvalidMediaError
from denoised.values import Artifact
from PIL import Image

from tests.daemon import Daemon

from .checkpoints import audio, video
from .checkpoints.family import picture
from .pair import seeded

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")
ASKED: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[denoised.Client]:
    with daemon.client() as client:
        yield client


@pytest.fixture(scope="module")
def longcat(client: denoised.Client, checkpoint_dir: Path) -> Iterator[denoised.Pipeline]:
    torch.manual_seed(0)
    audio.longcat(checkpoint_dir / "longcat")
    with denoised.AutoPipelineForText2Audio.from_pretrained(checkpoint_dir / "longcat", client=client) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def wan(client: denoised.Client, checkpoint_dir: Path) -> Iterator[denoised.Pipeline]:
    torch.manual_seed(0)
    video.wan(checkpoint_dir / "wan")
    with denoised.AutoPipelineForText2Video.from_pretrained(checkpoint_dir / "wan", client=client) as pipe:
        yield pipe


def test_a_sound_is_the_array_with_sixteen_bits_at_the_rate_of_its_checkpoint(longcat: denoised.Pipeline) -> None:
    samples = longcat("rain", audio_duration_s=0.1, num_inference_steps=2, seed=1, batching="forbid").audios
    result = longcat(
        "rain", audio_duration_s=0.1, num_inference_steps=2, seed=1, batching="forbid", media_type="audio/wav"
    )
    (sound,) = result.audios
    with wave.open(io.BytesIO(sound.data)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24000, 1, 2)
        heard = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    np.testing.assert_array_equal(heard, (samples[0, 0].clip(-1, 1) * 32767).round())


def test_steps_are_counted_also_where_there_is_no_noise_scheduler(longcat: denoised.Pipeline) -> None:
    seen: list[int] = []

    def see(_pipe: object, step: int, _timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return tensors

    longcat(
        "rain",
        audio_duration_s=0.1,
        num_inference_steps=4,
        callback_on_step_end=see,
    )
    assert seen[-1] == 3


def test_videos_come_as_images_in_lists_of_lists(wan: denoised.Pipeline, checkpoint_dir: Path) -> None:
    local = diffusers.WanPipeline.from_pretrained(checkpoint_dir / "wan")
    asked = {**ASKED, "num_frames": 5, "num_videos_per_prompt": 2, "output_type": "pil"}
    expected = local("a boat", **asked, generator=seeded(3)).frames
    actual = wan("a boat", **asked, generator=seeded(3), batching="forbid").frames
    assert [len(each) for each in actual] == [len(each) for each in expected] == [5, 5]
    for left, right in zip(actual, expected, strict=True):
        for one, other in zip(left, right, strict=True):
            assert isinstance(one, Image.Image)
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_a_video_is_a_file_with_the_same_frames(wan: denoised.Pipeline, output_type: str) -> None:
    asked = {**ASKED, "num_frames": 5, "seed": 3, "batching": "forbid"}
    frames = wan("a boat", **asked, output_type="np").frames[0]
    result = wan("a boat", **asked, output_type=output_type, media_type="video/mp4", frames_per_second=24)
    (file,) = result.frames
    with av.open(io.BytesIO(file.data), "r") as container:
        assert container.streams.video[0].average_rate == 24
        seen = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert seen.shape == frames.shape
    # H.264 keeps the brightness better than the colours of single pixels.
    assert abs(seen.mean() / 255 - frames.mean()) < 0.03


def test_a_video_file_is_taken_for_its_frames(
    wan: denoised.Pipeline, client: denoised.Client, checkpoint_dir: Path
) -> None:
    file = wan("a boat", **ASKED, num_frames=5, seed=3, media_type="video/mp4").frames[0]
    with av.open(io.BytesIO(file.data), "r") as container:
        frames = [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    with denoised.AutoPipelineForVideo2Video.from_pipe(wan) as pipe:
        asked = {**ASKED, "strength": 0.8, "seed": 1, "batching": "forbid"}
        results = [pipe(prompt="a boat", video=given, **asked).frames for given in (file, frames)]
        np.testing.assert_array_equal(*results)
        secret = checkpoint_dir / "secret.mp4"
        secret.write_bytes(file.data)
        playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n"
        for nothing in (b"no video", playlist.encode(), file.data[: len(file.data) // 2]):
            with pytest.raises(InvalidMediaError):
                pipe(prompt="a boat", video=Artifact("video/mp4", nothing), height=16, width=16)


def test_the_command_line_writes_sounds_and_videos(
    longcat: denoised.Pipeline, wan: denoised.Pipeline, daemon: Daemon, tmp_path: Path
) -> None:
    sound, clip = tmp_path / "rain.wav", tmp_path / "boat.mp4"
    small = ["--steps", "2", "--width", "16", "--height", "16", "--fps", "8"]
    commands = [
        [longcat.name, "-p", "rain", "--steps", "2", "--arg", "audio_duration_s=0.1", "-o", str(sound)],
        [wan.name, "-p", "a boat", *small, "--arg", "num_frames=5", "-o", str(clip)],
    ]
    for command in commands:
        line = [sys.executable, "-m", "denoised", "generate", *command, "--target", daemon.target, "--json"]
        done = subprocess.run(line, capture_output=True, text=True, check=True, env=dict(os.environ))
        told = json.loads(done.stdout)
        assert command[-1] in {*told.get("audios", ()), *told.get("frames", ())}
    with wave.open(str(sound)) as file:
        assert file.getnframes() > 0
    with av.open(str(clip), "r") as container:
        assert len(list(container.decode(video=0))) == 5


def test_images_are_not_written_into_a_video(client: denoised.Client, sd_checkpoint: Path) -> None:
    with denoised.AutoPipelineForText2Image.from_pretrained(sd_checkpoint, client=client) as pipe:
        (image,) = pipe("a cat", num_inference_steps=1, height=64, width=64, media_type="video/mp4").images
    assert image.size == picture().size

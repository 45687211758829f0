"""Videos that unfold to more than their senders may take."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from denoised.allowance import PICTURES, Allowance
from denoised.errors import InvalidMediaError
from denoised.values import Artifact
from denoised_server.worker import recordings


def video(side: int, frames: int) -> Artifact:
    (file,) = recordings.videos(np.zeros((1, frames, side, side, 3), np.float32), 8.0)
    return file


def test_a_video_of_large_frames_is_refused_by_its_header() -> None:
    bomb = video(2048, 2)
    assert len(bomb.data) < 40_000
    start = bomb.data.index(b"mdat") + 4
    broken = replace(bomb, data=bomb.data[:start] + bytes(1000) + bomb.data[start + 1000 :])
    for file in (bomb, broken):
        with pytest.raises(InvalidMediaError, match="2,048 x 2,048 pixels"):
            recordings.frames(file, Allowance.of(512 * 512))


def test_a_video_of_many_frames_is_refused_when_they_are_too_many() -> None:
    allowance = Allowance.of(64 * 64)
    assert len(recordings.frames(video(64, PICTURES), replace(allowance))) == PICTURES
    with pytest.raises(InvalidMediaError, match="together"):
        recordings.frames(video(64, 200), allowance)

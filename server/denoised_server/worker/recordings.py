"""Sound and video as files, and videos as frames: WAV of 16 bits, MP4 with H.264."""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import av
import numpy as np
import torch
from denoised.allowance import Allowance
from denoised.errors import InvalidFieldError, InvalidMediaError
from denoised.values import Artifact
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

WAV, MP4 = "audio/wav", "video/mp4"
# Fields of diffusers' output classes, and what they can be had as.
FIELDS = {"audios": WAV, "frames": MP4}
FRAMES_PER_SECOND = 16.0
# What a few kilobytes of video may unfold to, all frames together.
MAX_PIXELS = 1 << 28


def sounds(value: Any, rate: int) -> list[Artifact]:
    """One file for each sound of an array (sound, time) or (sound, channel, time), in -1…1."""
    samples = _array(value)
    if samples.ndim not in (2, 3) or samples.dtype.kind != "f":
        raise _unfit(WAV)
    return [_wav(np.atleast_2d(each), rate) for each in samples]


def videos(value: Any, frames_per_second: float) -> list[Artifact]:
    """One file for each video: lists of images, or an array (video, frame, height, width, channel) in 0…1."""
    if isinstance(value, list) and all(isinstance(frame, Image.Image) for video in value for frame in video):
        return [_mp4([np.asarray(frame.convert("RGB")) for frame in video], frames_per_second) for video in value]
    frames = _array(value)
    if isinstance(value, torch.Tensor) and frames.ndim == 5:
        frames = frames.transpose(0, 1, 3, 4, 2)
    if frames.ndim != 5 or frames.shape[-1] != 3 or frames.dtype.kind != "f":
        raise _unfit(MP4)
    pixels = (frames.clip(0, 1) * 255).round().astype(np.uint8)
    return [_mp4(list(video), frames_per_second) for video in pixels]


def frames(artifact: Artifact, allowance: Allowance) -> list[Image.Image]:
    """The frames of a video file. Raises InvalidMediaError."""
    found: list[Image.Image] = []
    pixels = 0
    try:
        # Of MP4 only: FFmpeg takes playlists for videos as well, which name other files and hosts.
        with av.open(io.BytesIO(artifact.data), "r", format="mp4") as container:
            header = container.streams.video[0].codec_context
            # Before anything is decoded. What a frame says itself counts as well.
            replace(allowance).take(header.width, header.height)
            for frame in container.decode(video=0):
                allowance.take(frame.width, frame.height)
                pixels += frame.width * frame.height
                if pixels > MAX_PIXELS:
                    raise InvalidMediaError(
                        f"The frames of the video have more than {MAX_PIXELS:,} pixels together.", hint="Send fewer."
                    )

                found.append(frame.to_image())
    except InvalidMediaError:
        raise
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise InvalidMediaError(
            f"{len(artifact.data)} bytes sent as {artifact.media_type} are not a video that can be decoded.",
            hint="Send a whole MP4 file, or the frames as images.",
        ) from error
    return found


def sampling_rate(pipeline: DiffusionPipeline) -> int:
    """Samples of a second of its sound, as its parts say. Raises InvalidFieldError where none does."""
    for part in pipeline.components.values():
        for name in ("sampling_rate", "sample_rate"):
            # A feature extractor's is that of what it listens to.
            rate = getattr(getattr(part, "config", None), name, None)
            if isinstance(rate, int):
                return rate
    raise InvalidFieldError.of(
        "output.media_type", "the pipeline does not say how many samples a second has.", hint='Use output_type "np".'
    )


def _wav(channels: NDArray[Any], rate: int) -> Artifact:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels.shape[0])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((channels.T.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    return Artifact(WAV, buffer.getvalue())


def _mp4(pictures: Sequence[NDArray[np.uint8]], frames_per_second: float) -> Artifact:
    buffer = io.BytesIO()
    height, width, _ = pictures[0].shape
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=round(frames_per_second), options={"crf": "17"})
        stream.width, stream.height = width, height
        # Half as many colours as pixels need even sides.
        stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return Artifact(MP4, buffer.getvalue())


def _array(value: Any) -> NDArray[Any]:
    if isinstance(value, torch.Tensor):
        value = value.float().cpu().numpy()
    return np.asarray(value)


def _unfit(media_type: str) -> InvalidFieldError:
    return InvalidFieldError.of(
        "output.media_type", f"what the pipeline returned cannot be encoded as {media_type}.", hint="Leave it out."
    )

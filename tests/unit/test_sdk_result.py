from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from denoised import media, values
from denoised.manifest import Manifest
from denoised.result import PipelineOutput, Timings, assemble
from denoised.v1 import generation_service_pb2 as pb
from PIL import Image

TIMINGS = Timings(0, 0, 0, 0, 0, 0, 0)
MANIFEST = Manifest(pb.Manifest())


def output(field: str, index: int, artifact: values.Artifact) -> pb.Output:
    return pb.Output(field=field, index=index, artifact=values.artifact_to_proto(artifact))


def test_images_come_in_the_order_of_their_index() -> None:
    pictures = [Image.new("RGB", (2, 2), (shade, 0, 0)) for shade in (10, 20)]
    outputs = [output("images", index, media.pack_image(pictures[index])) for index in (1, 0)]
    result = assemble(outputs, pb.Summary(seeds=[3, 4]), is_pil=True)
    assert [picture.getpixel((0, 0)) for picture in result.images] == [(10, 0, 0), (20, 0, 0)]
    assert result.seeds == (3, 4)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_raw_pixels_become_the_image_they_were(mode: str) -> None:
    picture = Image.effect_noise((5, 3), 50).convert(mode)
    result = assemble([output("images", 0, media.pack_image(picture, values.NDARRAY))], pb.Summary(), is_pil=True)
    assert result.images[0].mode == mode
    assert result.images[0].tobytes() == picture.tobytes()


def test_grey_pixels_with_a_channel_of_their_own_become_an_image() -> None:
    artifact = values.Artifact(values.NDARRAY, bytes(range(6)), "uint8", (2, 3, 1))
    result = assemble([output("images", 0, artifact)], pb.Summary(), is_pil=True)
    assert (result.images[0].mode, result.images[0].size) == ("L", (3, 2))


def test_frames_come_in_lists_of_their_videos() -> None:
    outputs = []
    for video, frame in ((1, 0), (0, 1), (0, 0), (1, 1)):
        shade = 100 * video + 10 * frame
        one = output("frames", frame, media.pack_image(Image.new("RGB", (2, 2), (shade, 0, 0))))
        one.group = video
        outputs.append(one)
    frames = assemble(outputs, pb.Summary(), is_pil=True).frames
    assert [[frame.getpixel((0, 0))[0] for frame in video] for video in frames] == [[0, 10], [100, 110]]


def test_sounds_and_videos_are_files_in_a_list(tmp_path: Path) -> None:
    file = values.Artifact("audio/wav", b"RIFF")
    (sound,) = assemble([output("audios", 0, file)], pb.Summary(), is_pil=False).audios
    sound.save(tmp_path / "rain.wav")
    assert (tmp_path / "rain.wav").read_bytes() == b"RIFF"


def test_an_array_is_the_whole_field() -> None:
    artifact = values.Artifact(values.NDARRAY, np.ones((2, 4, 4, 3), np.float32).tobytes(), "float32", (2, 4, 4, 3))
    assert assemble([output("images", 0, artifact)], pb.Summary(), is_pil=False).images.shape == (2, 4, 4, 3)


def test_it_is_read_like_an_output_of_diffusers() -> None:
    result = PipelineOutput(
        {"images": [1, 2], "nsfw": None, "flags": [False]}, seeds=(7,), timings=TIMINGS, manifest=MANIFEST
    )
    assert result.images == result["images"] == result[0] == [1, 2]
    assert result.nsfw is None
    assert list(result) == ["images", "flags"]
    assert (len(result), "nsfw" in result, dict(result)) == (2, False, {"images": [1, 2], "flags": [False]})
    assert result.to_tuple() == ([1, 2], [False])
    assert result.all_fields() == ([1, 2], None, [False])


def test_a_missing_field_names_those_there_are() -> None:
    result = PipelineOutput({"images": []}, seeds=(), timings=TIMINGS, manifest=MANIFEST)
    with pytest.raises(AttributeError, match="no 'image'; there is images, seeds, timings, manifest"):
        _ = result.image

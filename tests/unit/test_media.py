from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from denoised import errors, media, values
from denoised.allowance import Allowance
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

NUMPY_DTYPES = [name for name in values.DTYPES if name != "bfloat16"]


@given(
    st.sampled_from(NUMPY_DTYPES).flatmap(lambda name: arrays.arrays(name, arrays.array_shapes(min_dims=0, min_side=0)))
)
def test_an_array_comes_back_bit_for_bit(array: np.ndarray[Any, Any]) -> None:
    back = media.unpack(media.pack(array))
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())


@pytest.mark.parametrize("dtype", list(values.DTYPES))
@pytest.mark.parametrize("shape", [(), (0, 4), (2, 3)])
def test_a_tensor_comes_back_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape).to(getattr(torch, dtype))
    back = media.unpack(media.pack(tensor))
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)
    back.zero_()


@pytest.mark.parametrize("axes", [(0, 3, 1, 2), (3, 2, 1, 0), (1, 0, 2, 3)])
def test_the_memory_format_comes_back(axes: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).random((2, 3, 4, 5)).transpose(axes)
    back = media.unpack(media.pack(array))
    assert np.array_equal(back, array)
    assert back.strides == array.strides
    tensor = torch.from_numpy(array)
    restored = media.unpack(media.pack(tensor))
    assert torch.equal(restored, tensor)
    assert restored.stride() == tensor.stride()


def test_views_and_other_byte_orders_are_straightened() -> None:
    array = np.arange(6, dtype=">i4").reshape(2, 3).T
    assert (media.unpack(media.pack(array)) == array).all()
    tensor = torch.arange(6).reshape(2, 3).T
    assert torch.equal(media.unpack(media.pack(tensor)), tensor)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_an_image_comes_back_with_its_mode(mode: str) -> None:
    picture = Image.new(mode, (5, 3))
    back = media.unpack(media.pack(picture))
    assert (back.mode, back.size, back.tobytes()) == (mode, (5, 3), picture.tobytes())
    assert type(back) is Image.Image


@pytest.mark.parametrize("media_type", ["image/jpeg", "image/webp"])
def test_lossy_formats_take_a_quality(media_type: str) -> None:
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    sizes = [len(media.pack_image(picture, media_type, quality).data) for quality in (10, 95)]
    assert sizes[0] < sizes[1]
    assert media.unpack(media.pack_image(picture, media_type)).size == (64, 64)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(TypeError, match="image/gif"):
        media.pack_image(Image.new("L", (1, 1)), "image/gif")


@pytest.mark.parametrize(
    "artifact",
    [
        values.Artifact("image/png", b"not an image"),
        values.Artifact("image/png", b""),
        values.Artifact("text/plain", b"hello"),
        values.Artifact(values.TENSOR, b"\0" * 4),
        values.Artifact(values.TENSOR, b"\0" * 4, "float32", (2,)),
        values.Artifact(values.TENSOR, b"", "float32", (-1, 0)),
        values.Artifact(values.NDARRAY, b"\0" * 2, "bfloat16", (1,)),
    ],
)
def test_what_cannot_be_decoded_is_named_with_a_hint(artifact: values.Artifact) -> None:
    with pytest.raises(errors.InvalidMediaError) as caught:
        media.unpack(artifact)
    assert caught.value.hint


def test_a_truncated_image_is_refused() -> None:
    data = media.pack_image(Image.effect_noise((64, 64), 80)).data
    with pytest.raises(errors.InvalidMediaError):
        media.unpack(values.Artifact("image/png", data[: len(data) // 2]))


def test_formats_that_start_other_programs_are_not_opened() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "EPS")
    with pytest.raises(errors.InvalidMediaError):
        media.unpack(values.Artifact("image/png", buffer.getvalue()))


def test_values_are_packed_inside_lists_and_dicts() -> None:
    packed = media.pack({"a": [np.float32(0.5), np.bool_(True), (1, None)], "b": Image.new("L", (1, 1))})
    assert packed["a"] == [0.5, True, [1, None]]  # type: ignore[index, call-overload]
    assert media.unpack(packed)["b"].size == (1, 1)


@pytest.mark.parametrize("value", [object(), np.array(["text"]), np.array([1 + 2j]), torch.tensor([1j])])
def test_what_cannot_travel_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be sent"):
        media.pack(value)


@pytest.mark.parametrize(("mode", "becomes"), [("HSV", "RGB"), ("La", "LA"), ("RGBa", "RGBA")])
def test_a_mode_that_no_format_keeps_is_converted(mode: str, becomes: str) -> None:
    assert media.unpack(media.pack_image(Image.new(mode, (4, 4)))).mode == becomes


@pytest.mark.parametrize("mode", ["CMYK", "F", "I", "YCbCr", "LAB"])
def test_a_mode_that_no_format_of_ours_keeps_is_refused_with_what_to_do(mode: str) -> None:
    with pytest.raises(TypeError, match="convert it"):
        media.pack(Image.new(mode, (4, 4)))


def png(width: int, height: int) -> values.Artifact:
    return media.pack_image(Image.new("1", (width, height)))


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    bomb = png(8192, 8192)
    assert len(bomb.data) < 40_000
    # The header alone is enough to be refused: nothing behind it is read.
    for data in (bomb.data, bomb.data[:64]):
        with pytest.raises(errors.InvalidMediaError, match="8,192"):
            media.unpack(values.Artifact("image/png", data), Allowance.of(4_000_000))


def test_many_pictures_share_one_allowance() -> None:
    picture, allowance = png(64, 64), Allowance.of(64 * 64)
    media.unpack([picture] * 16, allowance)
    with pytest.raises(errors.InvalidMediaError, match="together"):
        media.unpack({"more": [picture]}, allowance)


@pytest.mark.parametrize("form", ["TIFF", "GIF", "BMP", "ICO", "PPM", "JPEG2000", "EPS", "PDF"])
def test_only_three_formats_are_opened_whatever_the_media_type_says(form: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, form)
    for media_type in ("image/png", f"image/{form.lower()}"):
        with pytest.raises(errors.InvalidMediaError):
            media.unpack(values.Artifact(media_type, buffer.getvalue()))


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_an_animation_is_refused(form: str) -> None:
    buffer, frames = io.BytesIO(), [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 255)]
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:])
    with pytest.raises(errors.InvalidMediaError, match="animation"):
        media.unpack(values.Artifact(f"image/{form.lower()}", buffer.getvalue()))


def test_a_photograph_is_turned_as_its_camera_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "JPEG", exif=exif)
    assert media.unpack(values.Artifact("image/jpeg", buffer.getvalue())).size == (20, 30)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_numbers_that_are_not_finite_are_refused_where_they_come_from_somebody_else(bad: float, dtype: str) -> None:
    array = np.array([0, bad], dtype)
    for value in (array, torch.from_numpy(array), torch.tensor([0, bad], dtype=torch.bfloat16)):
        with pytest.raises(errors.InvalidMediaError, match="finite"):
            media.unpack(media.pack(value), Allowance.of(1))
        media.unpack(media.pack(value))


def test_truth_values_are_true_or_false_whatever_was_sent() -> None:
    for kind in (values.TENSOR, values.NDARRAY):
        back = media.unpack(values.Artifact(kind, b"\x00\x01\x07", "bool", (3,)))
        assert [int(item) for item in back] == [0, 1, 1]


@pytest.mark.parametrize("shape", [(2**31, 0), (1,) * 17, (-1,), (2**62, 4, 0)])
def test_a_shape_beyond_reason_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(errors.InvalidMediaError):
        media.unpack(values.Artifact(values.TENSOR, b"\0" if 0 not in shape else b"", "uint8", shape))

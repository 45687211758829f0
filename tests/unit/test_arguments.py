"""Arguments of a call, checked as a table."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from denoised.errors import InvalidFieldError, UnknownArgumentError
from denoised.values import NDARRAY, TENSOR, Artifact, Plain
from denoised_server.arguments import check, merge
from denoised_server.messages import Generate, Parameter

IMAGE = Artifact("image/png", b"png")
EMBEDS = Artifact(TENSOR, b"", "float32", (3, 77, 768))


def parameter(name: str, *kinds: str, default: Plain = None, required: bool = False) -> Parameter:
    return Parameter(name, " | ".join(kinds), frozenset(kinds), required, default, has_default=not required)


PARAMETERS = (
    parameter("prompt", "str", "list"),
    parameter("negative_prompt", "str", "list"),
    parameter("prompt_embeds", "tensor"),
    parameter("image"),
    parameter("height", "int"),
    parameter("width", "int"),
    parameter("num_inference_steps", "int", default=50),
    parameter("guidance_scale", "float", default=7.5),
    parameter("strength", "float", default=0.8),
    parameter("num_images_per_prompt", "int", default=1),
    parameter("cross_attention_kwargs", "dict"),
    parameter("clip_skip", "int"),
    parameter("sigmas", "list"),
    parameter("return_masks", "bool", default=False),
    parameter("eta", "float", default=0.0),
    parameter("generator", "list"),
    parameter("callback_on_step_end"),
)


def call(
    arguments: Mapping[str, Plain] | tuple[()] = (), parameters: Sequence[Parameter] = PARAMETERS, **others: Any
) -> None:
    check(Generate("pipelines/a", dict(arguments), **others), parameters, max_pixels=1_000_000)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"prompt": "a cat"},
        {"prompt": ["a cat", "a dog"]},
        {"prompt": None, "prompt_embeds": EMBEDS},
        {"prompt": "x" * 65_536},
        {"image": IMAGE},
        {"image": [IMAGE, IMAGE]},
        {"height": None},
        {"height": 1, "width": 1},
        {"height": 1000, "width": 1000},
        {"height": 1, "width": 1_000_000},
        {"num_inference_steps": 1},
        {"num_inference_steps": 1000},
        {"guidance_scale": -3.5},
        {"guidance_scale": 7},
        {"strength": 0},
        {"strength": 1.0},
        {"num_images_per_prompt": 64},
        {"cross_attention_kwargs": {"scale": 0.5}},
        {"sigmas": [1.0, 0.5]},
        {"return_masks": True},
    ],
)
def test_these_arguments_are_fine(arguments: dict[str, Plain]) -> None:
    call(arguments)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 3),
        ("prompt", {"a": "cat"}),
        ("prompt", "x" * 65_537),
        ("prompt", ["fine", "x" * 65_537]),
        ("cross_attention_kwargs", {"deep": ["x" * 65_537]}),
        ("height", 0),
        ("height", -8),
        ("height", 512.0),
        ("height", True),
        ("height", "512"),
        ("width", 0),
        ("num_inference_steps", 0),
        ("num_inference_steps", -5),
        ("num_inference_steps", 1001),
        ("num_inference_steps", 2.5),
        ("guidance_scale", math.nan),
        ("guidance_scale", math.inf),
        ("guidance_scale", "strong"),
        ("guidance_scale", True),
        ("strength", -0.1),
        ("strength", 1.1),
        ("strength", math.nan),
        ("num_images_per_prompt", 0),
        ("num_images_per_prompt", 65),
        ("return_masks", 1),
        ("sigmas", 0.5),
        ("prompt_embeds", "a cat"),
        ("cross_attention_kwargs", [1]),
    ],
)
def test_these_are_refused_by_the_name_of_the_field(field: str, value: Plain) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        call({field: value})
    assert caught.value.metadata["field"] == field


@pytest.mark.parametrize("size", [{"height": 1001, "width": 1000}, {"height": 1001}, {"width": 100_000}])
def test_too_many_pixels_are_refused(size: dict[str, Plain]) -> None:
    with pytest.raises(InvalidFieldError, match="max_pixels"):
        call(size)


@pytest.mark.parametrize(
    ("name", "suggestion"), [("promt", "prompt"), ("num_inference_step", "num_inference_steps"), ("generators", None)]
)
def test_an_unknown_name_comes_with_the_nearest_that_there_is(name: str, suggestion: str | None) -> None:
    with pytest.raises(UnknownArgumentError) as caught:
        call({name: 1})
    assert caught.value.metadata.get("suggestion") == suggestion
    assert (suggestion or name) in str(caught.value)


def test_an_endless_name_is_refused_in_few_words() -> None:
    with pytest.raises(UnknownArgumentError) as caught:
        call({"promt" + "x" * 6_000_000: 1})
    assert "suggestion" not in caught.value.metadata
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("generator", "sampling.seeds"),
        ("output_type", "output.output_type"),
        ("return_dict", "names"),
        ("callback_on_step_end", "events"),
        ("callback", "events"),
    ],
)
def test_what_means_something_else_at_a_distance_is_refused_with_what_to_use(name: str, instead: str) -> None:
    with pytest.raises(InvalidFieldError, match=instead) as caught:
        call({name: None})
    assert caught.value.metadata["field"] == name


def test_what_is_required_must_be_sent() -> None:
    required = (*PARAMETERS, parameter("mask_image", required=True), parameter("generator", required=True))
    with pytest.raises(InvalidFieldError) as caught:
        call({}, required)
    assert caught.value.metadata["field"] == "mask_image"
    call({"mask_image": IMAGE}, required)


@pytest.mark.parametrize(
    ("arguments", "count", "is_fine"),
    [
        ({"prompt": "cat"}, 1, True),
        ({"prompt": "cat"}, 2, False),
        ({"prompt": "cat", "num_images_per_prompt": 2}, 2, True),
        ({"prompt": ["cat", "dog"]}, 2, True),
        ({"prompt": ["cat", "dog"], "num_images_per_prompt": 2}, 2, False),
        ({"prompt": ["cat", "dog"], "num_images_per_prompt": 2}, 4, True),
        ({"prompt": ["cat", "dog"]}, 1, True),
        ({"prompt_embeds": EMBEDS}, 3, True),
        ({"prompt_embeds": EMBEDS}, 2, False),
        ({}, 5, True),
    ],
)
def test_there_is_one_seed_or_one_for_each_image(arguments: dict[str, Plain], count: int, is_fine: bool) -> None:
    def sent(**randomness: Any) -> None:
        if is_fine:
            call(arguments, **randomness)
        else:
            with pytest.raises(InvalidFieldError):
                call(arguments, **randomness)

    sent(seeds=tuple(range(count)))
    sent(generators=(("cpu", b"state"),) * count)


@pytest.mark.parametrize(
    "others",
    [
        {"seeds": (1,), "generators": (("cpu", b""),)},
        {"generators": (("tpu", b""),)},
        {"output_type": "jpg"},
        {"media_type": "image/gif"},
        {"frames_per_second": 0.5},
        {"frames_per_second": math.nan},
        {"quality": 0},
        {"quality": 101},
        {"priority": 101},
        {"priority": -101},
    ],
)
def test_the_rest_of_a_request_has_bounds_too(others: dict[str, Any]) -> None:
    with pytest.raises(InvalidFieldError):
        call(**others)


@pytest.mark.parametrize(
    "others",
    [
        {"output_type": "latent"},
        {"output_type": ""},
        {"media_type": NDARRAY},
        {"media_type": "video/mp4"},
        {"frames_per_second": 240.0},
        {"quality": 1},
        {"priority": -100},
        {"seeds": (2**64 - 1,)},
    ],
)
def test_the_rest_of_a_request_may_be_at_its_bounds(others: dict[str, Any]) -> None:
    call(**others)


def test_sounds_and_videos_are_counted_as_images_are() -> None:
    for name in ("num_videos_per_prompt", "num_waveforms_per_prompt"):
        makes = (parameter("prompt", "str"), parameter(name, "int", default=1))
        call({"prompt": "rain", name: 2}, makes, seeds=(1, 2))
        with pytest.raises(InvalidFieldError, match="3 for 2"):
            call({"prompt": "rain", name: 2}, makes, seeds=(1, 2, 3))


def test_a_video_file_is_taken_where_frames_are() -> None:
    takes = (parameter("video", "list", "tensor"), parameter("image", "image"))
    call({"video": Artifact("video/mp4", b"mp4")}, takes)
    with pytest.raises(InvalidFieldError):
        call({"image": Artifact("video/mp4", b"mp4")}, takes)


def test_fields_and_the_map_are_one_set_of_arguments() -> None:
    assert merge({"prompt": "cat"}, {"eta": 0.5}) == {"prompt": "cat", "eta": 0.5}
    with pytest.raises(InvalidFieldError, match="twice"):
        merge({"prompt": "cat"}, {"prompt": "dog"})


def tensor(dtype: str, data: bytes) -> Artifact:
    return Artifact(TENSOR, data, dtype, (len(data) // 2 if dtype != "float32" else len(data) // 4,))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("latents", tensor("float32", struct.pack("<2f", 1.0, math.nan))),
        ("latents", tensor("float16", struct.pack("<2e", 1.0, math.inf))),
        ("prompt_embeds", tensor("bfloat16", b"\x80\x3f\xc0\x7f")),
        ("latents", Artifact(TENSOR, bytes(8), "int64", (1,))),
    ],
)
def test_numbers_that_would_make_only_nan_are_refused(name: str, value: Artifact) -> None:
    parameter = Parameter(name, default=None, has_default=True)
    with pytest.raises(InvalidFieldError) as failed:
        check(Generate("pipelines/a", {name: value}), [parameter], max_pixels=10**6)
    assert failed.value.metadata["field"] == name


def test_ordinary_numbers_pass_whatever_their_type() -> None:
    ordinary = {
        "float32": struct.pack("<2f", 1, -3e38),
        "float16": b"\x00\x3c\xff\x7b",
        "bfloat16": b"\x80\x3f\x7f\x7f",
    }
    for dtype, data in ordinary.items():
        command = Generate("pipelines/a", {"latents": tensor(dtype, data)})
        check(command, [Parameter("latents")], max_pixels=10**6)


def test_prompts_are_counted() -> None:
    with pytest.raises(InvalidFieldError, match="10,000 elements"):
        check(Generate("pipelines/a", {"prompt": ["a"] * 10_000}), [Parameter("prompt")], max_pixels=10**6)

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from denoised import arguments, channel, errors, values
from denoised.v1 import generation_service_pb2 as pb
from PIL import Image

PICTURE = Image.new("RGB", (4, 4))


def built(**named: Any) -> pb.GenerateRequest:
    request = pb.GenerateRequest()
    arguments.add_arguments(request, named)
    return request


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("height", 64),
        ("width", np.int64(64)),
        ("num_inference_steps", 25),
        ("num_images_per_prompt", 2),
        ("guidance_scale", 7.5),
        ("guidance_scale", 7),
        ("strength", np.float32(0.5)),
    ],
)
def test_what_the_daemon_plans_with_is_typed(name: str, value: Any) -> None:
    request = built(**{name: value})
    assert getattr(request.sampling, name) == value
    assert not request.arguments


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("prompt", ["a", "b"], "list_value"),
        ("prompt", None, "null_value"),
        ("image", [PICTURE, PICTURE], "list_value"),
        ("mask_image", None, "null_value"),
        ("height", "64", "string_value"),
        ("height", True, "bool_value"),
        ("height", 2**40, "int_value"),
        ("num_inference_steps", 2.5, "double_value"),
        ("guidance_scale", [1.0, 2.0], "list_value"),
        ("clip_skip", 1, "int_value"),
        ("eta", 0.5, "double_value"),
        ("cross_attention_kwargs", {"scale": 0.5}, "map_value"),
        ("control_image", PICTURE, "artifact_value"),
    ],
)
def test_everything_else_travels_by_name_as_it_is(name: str, value: Any, kind: str) -> None:
    request = built(**{name: value})
    assert request.arguments[name].WhichOneof("kind") == kind
    assert not request.HasField("sampling")


@pytest.mark.parametrize(
    ("image", "media_type"),
    [
        (PICTURE, "image/png"),
        (np.zeros((4, 4, 3), np.uint8), values.NDARRAY),
        (torch.zeros(1, 3, 4, 4), values.TENSOR),
    ],
)
def test_images_arrays_and_tensors_keep_their_kind(image: Any, media_type: str) -> None:
    request = built(image=image, mask_image=image)
    assert request.image.media_type == request.mask_image.media_type == media_type


def test_infinity_is_the_daemons_to_refuse() -> None:
    assert built(guidance_scale=math.inf).sampling.guidance_scale == math.inf


@pytest.mark.parametrize("value", [object(), {1, 2}, 2**70, "\ud800", np.array(["text"]), [object()]])
def test_what_cannot_be_sent_is_named(value: Any) -> None:
    with pytest.raises(errors.InvalidFieldError) as caught:
        built(clip_skip=value)
    assert caught.value.metadata == {"field": "clip_skip"}


@pytest.mark.parametrize(
    ("seed", "seeds"), [(None, []), (0, [0]), (2**64 - 1, [2**64 - 1]), ([1, np.int64(2)], [1, 2])]
)
def test_seeds_are_sent_as_they_are(seed: Any, seeds: list[int]) -> None:
    request = pb.GenerateRequest()
    arguments.add_seeds(request, seed)
    assert list(request.sampling.seeds) == seeds


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7", [1, None]])
def test_what_is_no_seed_is_refused(seed: Any) -> None:
    with pytest.raises(errors.InvalidFieldError, match="seed"):
        arguments.add_seeds(pb.GenerateRequest(), seed)


def test_only_generators_of_torch_are_taken() -> None:
    with pytest.raises(errors.InvalidFieldError, match=r"a Generator is no torch\.Generator"):
        arguments.add_generators(pb.GenerateRequest(), np.random.default_rng())


@pytest.mark.parametrize("device", ["cpu"])
def test_a_generator_gets_back_the_state_that_it_is_given(device: str) -> None:
    request, generator = pb.GenerateRequest(), torch.Generator(device).manual_seed(3)
    before = torch.rand(4, generator=torch.Generator(device).manual_seed(3))
    generators = arguments.add_generators(request, generator)
    torch.rand(9, generator=generator)
    arguments.set_generators(generators, request.sampling.generators)
    assert torch.equal(torch.rand(4, generator=generator), before)


@pytest.mark.parametrize(
    ("target", "is_loopback"),
    [
        ("127.0.0.1:50051", True),
        ("localhost:1", True),
        ("[::1]:50051", True),
        ("dns:///localhost:50051", True),
        ("unix:/run/denoised.sock", True),
        ("gpu-host:50051", False),
        ("10.0.0.7:50051", False),
        ("localhost.example.org:50051", False),
    ],
)
def test_pixels_travel_raw_on_this_machine_only(target: str, is_loopback: bool) -> None:
    request = pb.GenerateRequest()
    arguments.add_output(request, "pil", media_type="", quality=None, target=target)
    assert request.output.media_type == (values.NDARRAY if is_loopback else "image/png")
    assert not request.output.HasField("quality")


def test_a_target_without_a_port_gets_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DENOISED_TARGET", raising=False)
    assert channel.resolve_target(None) == "127.0.0.1:50051"
    assert channel.resolve_target("gpu-host") == "gpu-host:50051"
    monkeypatch.setenv("DENOISED_TARGET", "other:7")
    assert channel.resolve_target(None) == "other:7"
    assert channel.resolve_target("gpu-host:1") == "gpu-host:1"
    assert channel.resolve_target("[::1]") == "[::1]:50051"
    assert channel.resolve_target("[::1]:7") == "[::1]:7"


def test_the_first_argument_is_the_prompt_while_the_others_are_not_known() -> None:
    assert arguments.by_name([], ["an apple"], {"width": 8}) == {"prompt": "an apple", "width": 8}
    with pytest.raises(TypeError, match="loading"):
        arguments.by_name([], ["an apple", 8], {})


@pytest.mark.parametrize("priority", [2**40, "high", 1.5])
def test_what_is_no_priority_is_refused(priority: Any) -> None:
    with pytest.raises(errors.InvalidFieldError, match="priority"):
        arguments.priority_number(priority)

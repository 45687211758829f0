"""Adapters of one call as they are sent, and as the daemon takes them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import typer
from denoised import Adapter, adapter
from denoised.cli.options import parse_adapters
from denoised.errors import InvalidFieldError
from denoised.v1 import adapter_pb2, generation_service_pb2
from denoised.values import to_proto
from denoised_server import messages, requests


def taken(selection: adapter_pb2.AdapterSelection) -> tuple[messages.Adapter, ...] | None:
    request = generation_service_pb2.GenerateRequest(pipeline="pipelines/a", adapters=selection)
    return requests.generate(request).adapters


def test_what_is_given_arrives() -> None:
    given: list[Adapter | str] = [
        Adapter("owner/style", 0.5, weight_name="x.safetensors"),
        "loaded",
        Adapter("loaded", {"unet": 1}),
    ]
    source = messages.AdapterSource("owner/style", "x.safetensors")
    assert taken(adapter.select(given, ["loaded"])) == (
        messages.Adapter(source=source, scale=0.5),
        messages.Adapter("loaded"),
        messages.Adapter("loaded", scale={"unet": 1}),
    )
    assert taken(adapter.select({"owner/style": 0.3}, [])) == (
        messages.Adapter(source=messages.AdapterSource("owner/style"), scale=0.3),
    )


def test_none_at_all_is_told_from_the_pipelines_own() -> None:
    assert taken(adapter.select([], [])) == ()
    assert requests.generate(generation_service_pb2.GenerateRequest(pipeline="pipelines/a")).adapters is None


@pytest.mark.parametrize("scale", [math.nan, math.inf, True, "1", None, {"unet": math.nan}, [1.0, math.inf]])
def test_a_scale_is_a_finite_number_for_both_sides(scale: Any) -> None:
    with pytest.raises(InvalidFieldError):
        adapter.select([Adapter("owner/style", scale)], [])
    message = adapter_pb2.Adapter(name="x", scale=to_proto(scale))
    with pytest.raises(InvalidFieldError):
        taken(adapter_pb2.AdapterSelection(adapters=[message]))


@pytest.mark.parametrize("given", ["owner/style", 5, [5], [None]])
def test_what_is_no_adapter_is_refused(given: Any) -> None:
    with pytest.raises(InvalidFieldError):
        adapter.select(given, [])


def test_a_thousand_adapters_and_empty_ones_are_refused() -> None:
    with pytest.raises(InvalidFieldError, match="1,000"):
        taken(adapter.select([f"owner/{index}" for index in range(1000)], []))
    for message in (
        adapter_pb2.Adapter(),
        adapter_pb2.Adapter(source=adapter_pb2.AdapterSource()),
        adapter_pb2.Adapter(name="x" * 2000),
    ):
        with pytest.raises(InvalidFieldError):
            taken(adapter_pb2.AdapterSelection(adapters=[message]))


def test_the_command_line_takes_a_repository_a_file_and_a_scale() -> None:
    assert parse_adapters(["owner/style", "owner/style:0.5", "/loras/a.safetensors:1"]) == [
        Adapter("owner/style"),
        Adapter("owner/style", 0.5),
        Adapter("/loras", 1.0, weight_name="a.safetensors"),
    ]
    assert parse_adapters(None) is None
    with pytest.raises(typer.BadParameter):
        parse_adapters(["owner/style:much"])

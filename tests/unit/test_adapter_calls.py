"""What may be done to adapters, and what is left of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from denoised.errors import InvalidFieldError
from denoised_server import adapter_calls
from denoised_server.messages import AdapterCall, AdapterSource

SOURCE = (AdapterSource("owner/style"),)


def load(name: str) -> AdapterCall:
    return AdapterCall("load_lora_weights", SOURCE, {"adapter_name": name})


def call(method: str, **arguments: Any) -> AdapterCall:
    return AdapterCall(method, (), arguments)


def use(*names: str) -> AdapterCall:
    return call("set_adapters", adapter_names=list(names))


FUSE, UNLOAD = call("fuse_lora"), call("unload_lora_weights")
ENCODER = AdapterCall("load_ip_adapter", SOURCE)
TOKEN = AdapterCall("load_textual_inversion", SOURCE, {"token": "<x>"})

LEFT: dict[str, tuple[list[AdapterCall], list[AdapterCall]]] = {
    "nothing of what is unloaded": ([load("a"), use("a"), TOKEN, UNLOAD], [TOKEN]),
    "nothing of unloading nothing": ([UNLOAD, call("unload_ip_adapter")], []),
    "the last choice": ([load("a"), use("a"), load("b"), use("a", "b")], [load("a"), load("b"), use("a", "b")]),
    "nothing of what is deleted, once others are chosen": (
        [load("a"), load("b"), call("delete_adapters", adapter_names="a"), use("b")],
        [load("b"), use("b")],
    ),
    "all of what is fused": ([load("a"), use("a"), FUSE, UNLOAD], [load("a"), use("a"), FUSE, UNLOAD]),
    "the last switch": ([load("a"), call("disable_lora"), call("enable_lora")], [load("a"), call("enable_lora")]),
    "the last scale": (
        [ENCODER, call("set_ip_adapter_scale", scale=1), call("set_ip_adapter_scale", scale=0.5)],
        [ENCODER, call("set_ip_adapter_scale", scale=0.5)],
    ),
    "nothing of an IP-Adapter that is gone": ([load("a"), ENCODER, call("unload_ip_adapter")], [load("a")]),
}


@pytest.mark.parametrize(("done", "left"), LEFT.values(), ids=LEFT)
def test_what_is_left(done: list[AdapterCall], left: list[AdapterCall]) -> None:
    assert adapter_calls.compact(done) == tuple(left)


def test_choosing_again_and_again_grows_nothing() -> None:
    calls: tuple[AdapterCall, ...] = (load("a"), load("b"))
    for number in range(1000):
        calls = adapter_calls.compact([*calls, use("a" if number % 2 else "b")])
    assert len(calls) == 3


def test_there_is_an_end_to_it() -> None:
    with pytest.raises(InvalidFieldError, match="too many"):
        adapter_calls.compact([load(str(number)) for number in range(1000)])


BAD = [
    call("load_everything"),
    call("__init__"),
    call("load_lora_weights"),
    call("set_adapters"),
    call("set_adapters", adapter_names=["a"], adapter_weights=math.nan),
    call("set_adapters", adapter_names=["a"], adapter_weights=[1.0, "x"]),
    call("set_adapters", adapter_names=[5]),
    call("set_adapters", adapter_names="a" * 65),
    call("fuse_lora", lora_scale=math.inf),
    call("fuse_lora", lora_scale={"unet": 1.0}),
    call("fuse_lora", scale=1.0),
    call("set_ip_adapter_scale", scale=None),
    AdapterCall("enable_lora", SOURCE),
    AdapterCall("load_ip_adapter", SOURCE * 9),
    AdapterCall("load_lora_weights", SOURCE, {"adapter_name": ""}),
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_what_no_pipeline_could_do_is_refused(bad: AdapterCall) -> None:
    with pytest.raises(InvalidFieldError):
        adapter_calls.check(bad, "settings.adapters[0]")


def test_what_diffusers_takes_is_taken() -> None:
    for good in (
        use("a"),
        call("set_adapters", adapter_names="a", adapter_weights=None),
        call("set_adapters", adapter_names=["a", "b"], adapter_weights=[{"unet": {"down": [0.5, 1]}}, None]),
        call("fuse_lora", components=["unet"], lora_scale=0.5, adapter_names=["a"]),
        call("set_ip_adapter_scale", scale=[{"up": {"block_0": [0.0, 1.0]}}, 0.5]),
        AdapterCall("load_ip_adapter", SOURCE * 2, {"image_encoder_folder": None}),
        TOKEN,
    ):
        adapter_calls.check(good, "settings.adapters[0]")

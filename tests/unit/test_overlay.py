"""A request's changes to shared modules, off and on."""

from __future__ import annotations

from collections.abc import Callable

import greenlet
import pytest
import torch
from denoised_server.worker import overlay
from denoised_server.worker.overlay import Overlay
from torch import nn


@pytest.fixture(autouse=True)
def hooks() -> None:
    overlay.install()


class Requested(greenlet.greenlet):  # type: ignore[misc]
    """Code that runs as part of a request."""

    def __init__(self, run: Callable[[], object]) -> None:
        super().__init__(run)
        self.overlay = Overlay()


def as_request(run: Callable[[], object]) -> Overlay:
    request = Requested(run)
    request.switch()
    return request.overlay


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.processor = "plain"
        self.linear = nn.Linear(2, 2)
        self.register_buffer("scale", torch.ones(1))


def test_an_attribute_is_taken_off_and_put_on() -> None:
    module = Attention()
    changes = as_request(lambda: setattr(module, "processor", "pag"))
    assert module.processor == "pag"
    changes.take_off()
    assert module.processor == "plain"
    assert changes
    changes.put_on()
    assert module.processor == "pag"


def test_a_cast_is_taken_off_with_the_very_same_weights() -> None:
    module = Attention().half()
    before = module.linear.weight.data_ptr()
    changes = as_request(lambda: module.to(torch.float32))
    assert module.linear.weight.dtype == module.scale.dtype == torch.float32
    changes.take_off()
    assert module.linear.weight.dtype == module.scale.dtype == torch.float16
    assert module.linear.weight.data_ptr() == before
    changes.put_on()
    assert module.linear.weight.dtype == torch.float32


def test_a_change_that_amounts_to_nothing_is_forgotten() -> None:
    module = Attention()

    def run() -> None:
        module.processor = "pag"
        module.processor = "plain"
        module.to(torch.float32)

    changes = as_request(run)
    changes.take_off()
    assert not changes


def test_a_module_in_place_of_a_plain_value_is_taken_off_too() -> None:
    module = Attention()
    changes = as_request(
        lambda: module.__dict__.pop("processor") and setattr(module, "processor", nn.Identity())  # type: ignore[func-returns-value]
    )
    assert isinstance(module.processor, nn.Identity)
    changes.take_off()
    assert "processor" not in module._modules


def test_an_attribute_that_was_not_there_is_gone_again() -> None:
    module = Attention()
    changes = as_request(lambda: setattr(module, "cache", [1]))
    changes.take_off()
    assert not hasattr(module, "cache")
    changes.put_on()
    assert module.cache == [1]


def test_outside_of_requests_nothing_is_recorded() -> None:
    module = Attention()
    module.processor = "other"
    module.to(torch.float64)
    assert overlay.current() is None


def test_scales_of_peft_layers_are_taken_off() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
    layer = model.base_model.model[0]
    before = dict(layer.scaling)
    changes = as_request(lambda: layer.scale_layer(0.25))
    assert layer.scaling != before
    changes.take_off()
    assert layer.scaling == before
    changes.put_on()
    assert layer.scaling != before

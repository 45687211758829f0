"""Quantisation as data: what the SDK sends, what the daemon takes, and how it tells components apart."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from denoised import quantization as sdk
from denoised.errors import InvalidFieldError
from denoised.v1 import artifact_pb2, pipeline_service_pb2
from denoised.values import from_proto
from denoised_server import codec, quantization, recipes, references, requests, responses
from denoised_server.messages import ComponentSource, Recipe, Spec

INT8 = {"quant_method": "quanto", "weights_dtype": "int8"}
BY_BACKEND: dict[str, Any] = {
    "quant_backend": "quanto",
    "quant_kwargs": {"weights_dtype": "int8"},
    "components_to_quantize": ["unet"],
}
BY_COMPONENT: dict[str, Any] = {"quant_mapping": {"unet": INT8}}


def sent(config: Any) -> dict[str, Any]:
    return {name: from_proto(value) for name, value in sdk.fields(config).items()}


def test_every_way_to_say_it_is_sent_as_the_arguments_of_diffusers() -> None:
    empty = dict.fromkeys(sdk.PARAMETERS)
    assert sent(None) == {}
    assert sent(BY_BACKEND) == sent(SimpleNamespace(**{**empty, **BY_BACKEND})) == BY_BACKEND
    assert sent({"unet": INT8}) == sent(BY_COMPONENT) == BY_COMPONENT


def test_objects_of_diffusers_are_sent() -> None:
    assert sent({"unet": diffusers.QuantoConfig("int8")})["quant_mapping"]["unet"].items() >= INT8.items()
    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    whole = diffusers.PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit", quant_kwargs=four, components_to_quantize="unet"
    )
    data = quantization.check(sent(whole), "quantization_config")
    assert data["quant_kwargs"] == {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
    assert quantization.named(data) == ["unet"]
    each = sent({"text_encoder": transformers.BitsAndBytesConfig(**four)})
    assert (quantization.of(each, "text_encoder") or {})["quant_method"] == "bitsandbytes_4bit"


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ({}, "by component"),
        ("int8", "by component"),
        (SimpleNamespace(quant_method="quanto"), "by component"),
        ({"quant_backed": "quanto"}, "Did you mean 'quant_backend'"),
        ({"unet": {**INT8, "hook": object()}}, "Send numbers"),
        ({"unet": {**INT8, "bits": 2**70}}, "Send numbers"),
    ],
)
def test_what_says_nothing_about_components_is_refused_before_it_is_sent(config: Any, hint: str) -> None:
    with pytest.raises(InvalidFieldError, match=hint) as caught:
        sdk.fields(config)
    assert caught.value.metadata == {"field": "quantization_config"}


@pytest.mark.parametrize(
    ("config", "field", "hint"),
    [
        ({"quant_backend": "quantoo"}, "[quant_backend]", "Did you mean 'quanto'"),
        ({"quant_backend": 8}, "[quant_backend]", "Use one of"),
        ({"quant_kwargs": {"load_in_8bit": True}}, "[quant_backend]", "Use one of"),
        ({"quant_backnd": "quanto"}, "", "Did you mean 'quant_backend'"),
        ({**BY_BACKEND, "quant_kwargs": "int8"}, "[quant_kwargs]", "Name the backend's arguments"),
        ({**BY_BACKEND, "components_to_quantize": [1]}, "[components_to_quantize]", "such as 'unet'"),
        ({**BY_BACKEND, **BY_COMPONENT}, "", "Send it alone"),
        ({"quant_mapping": {}}, "[quant_mapping]", "Map each component"),
        ({"quant_mapping": {"unet": "int8"}}, "[quant_mapping][unet]", "Use one of"),
        ({"quant_mapping": {"unet": {"quant_method": "sdnq"}}}, "[quant_mapping][unet]", "Use one of"),
    ],
)
def test_malformed_data_is_refused_by_the_name_of_the_field(config: Any, field: str, hint: str) -> None:
    with pytest.raises(InvalidFieldError, match=hint) as caught:
        quantization.check(config, "it")
    assert caught.value.metadata == {"field": f"it{field}"}


def test_media_are_no_configuration() -> None:
    picture: Any = {"artifact_value": {"media_type": "image/png", "data": b"png"}}
    media: Any = {"entries": {"a": {"list_value": {"values": [picture]}}}}
    kwargs = artifact_pb2.Value(map_value=media)
    spec = pipeline_service_pb2.PipelineSpec(repo_id="a", quantization_config={"quant_kwargs": kwargs})
    with pytest.raises(InvalidFieldError, match="it has media"):
        requests.spec(pipeline_service_pb2.LoadPipelineRequest(spec=spec))


@pytest.mark.parametrize("config", [BY_BACKEND, BY_COMPONENT])
def test_a_spec_comes_back_from_wire_and_journal_as_it_was(config: Any) -> None:
    message = pipeline_service_pb2.PipelineSpec(repo_id="a", quantization_config=sdk.fields(config))
    spec = requests.spec(pipeline_service_pb2.LoadPipelineRequest(spec=message))
    assert spec.quantization_config == config
    assert codec.decode(codec.encode(spec)) == spec
    assert responses._spec(spec).quantization_config == message.quantization_config


def test_both_forms_say_the_same_of_a_component_and_nothing_of_the_others() -> None:
    assert quantization.of(BY_BACKEND, "unet") == quantization.of(BY_COMPONENT, "unet") == INT8
    assert quantization.of(BY_BACKEND, "vae") is quantization.of(BY_COMPONENT, "vae") is None
    everything = {"quant_backend": "quanto"}
    assert quantization.of(everything, "vae") == {"quant_method": "quanto"}
    assert quantization.of({}, "vae") is None


def test_recipes_that_quantise_differently_are_different() -> None:
    plain, int8 = Spec("a"), Spec("a", quantization_config=BY_COMPONENT)
    int4 = replace(int8, quantization_config={"quant_mapping": {"unet": {**INT8, "weights_dtype": "int4"}}})
    assert len({recipes.identity(Recipe(spec)) for spec in (plain, int8, int4, replace(int8))}) == 3


def test_a_quantised_part_is_not_lent_as_if_it_were_not() -> None:
    origin = references.Origin(Recipe(Spec("a", quantization_config=BY_COMPONENT)), ("unet", "vae"))
    borrowed = ComponentSource(pipeline="pipelines/a", role="unet")
    with pytest.raises(InvalidFieldError, match="is quantised"):
        references.resolve(Spec("b", overrides={"unet": borrowed}), lambda name: origin, "spec.overrides")
    kept = references.resolve(
        Spec("b", overrides={"vae": replace(borrowed, role="vae")}), lambda name: origin, "spec.overrides"
    )
    assert kept.overrides["vae"] == ComponentSource("a", subfolder="vae", dtype="float32")

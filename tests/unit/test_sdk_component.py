"""References to components in the SDK: what is sent for them, and what cannot be."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import denoised
import numpy as np
import pytest
import torch
from denoised import component, errors
from denoised.v1 import artifact_pb2
from denoised.v1 import pipeline_service_pb2 as pb
from diffusers import AutoencoderKL, DDIMScheduler

from tests import checkpoints


def sent(value: Any) -> pb.ComponentSource:
    return component.overrides({"role": value})["role"].component


@pytest.mark.parametrize(
    "name", ["ControlNetModel", "ControlNetUnionModel", "FluxControlNetModel", "AutoencoderKL", "CLIPTextModel"]
)
def test_every_class_can_be_named(name: str) -> None:
    reference = getattr(denoised, name).from_pretrained(
        "owner/name", subfolder="net", revision="v1", variant="fp16", torch_dtype=torch.float16, use_safetensors=True
    )
    assert sent(reference) == pb.ComponentSource(
        repo_id="owner/name",
        subfolder="net",
        class_name=name,
        revision="v1",
        variant="fp16",
        dtype=artifact_pb2.DATA_TYPE_FLOAT16,
        use_safetensors=True,
    )


def test_a_component_without_a_class_leaves_it_to_the_repository() -> None:
    assert sent(denoised.Component("owner/name", "vae")) == pb.ComponentSource(repo_id="owner/name", subfolder="vae")
    assert sent(denoised.Component("owner/name", class_name="AutoencoderTiny")).class_name == "AutoencoderTiny"


def test_a_class_of_references_is_one_class() -> None:
    assert denoised.ControlNetModel is denoised.ControlNetModel
    reference = denoised.ControlNetModel.from_pretrained("owner/name")
    assert isinstance(reference, denoised.Component)
    assert repr(reference) == "ControlNetModel(repo_id='owner/name', class_name='ControlNetModel')"
    assert pickle.loads(pickle.dumps(reference)) == copy.deepcopy(reference) == reference


@pytest.mark.parametrize(
    "name", ["Clinet", "AutoPipelineForText2Imge", "StableDiffusionPipeline", "nothing", "LodError"]
)
def test_slips_are_no_classes(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(denoised, name)


def test_a_slip_gets_a_suggestion() -> None:
    with pytest.raises(AttributeError, match="Did you mean 'AutoPipelineForText2Image'"):
        _ = denoised.AutoPipelineForText2Imge


def test_several_components_in_one_role() -> None:
    nets = [denoised.ControlNetModel.from_pretrained(f"owner/{name}") for name in ("canny", "depth")]
    override = component.overrides({"controlnet": nets})["controlnet"]
    assert [source.repo_id for source in override.components.components] == ["owner/canny", "owner/depth"]


def test_lists_of_plain_values_are_values() -> None:
    override = component.overrides({"pag_applied_layers": ["mid", "up"]})["pag_applied_layers"]
    assert [item.string_value for item in override.value.list_value.values] == ["mid", "up"]


def test_a_directory_is_sent_as_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "config.json").write_text("{}")
    assert sent(denoised.ControlNetModel.from_pretrained("net")).repo_id == str((tmp_path / "net").resolve())


def test_moving_a_reference_changes_its_element_type_at_most() -> None:
    reference = denoised.ControlNetModel.from_pretrained("owner/name")
    assert reference.to("cuda") is reference
    assert sent(reference.to("cuda", torch.bfloat16)).dtype == artifact_pb2.DATA_TYPE_BFLOAT16


def test_a_noise_scheduler_of_diffusers_travels_as_its_configuration() -> None:
    scheduler = checkpoints.ddim()
    source = sent(scheduler)
    assert source.class_name == "DDIMScheduler"
    assert source.config["beta_start"].double_value == 0.00085
    assert source.config["clip_sample"].bool_value is False
    assert source.config["trained_betas"].HasField("null_value")
    assert sent(DDIMScheduler(trained_betas=np.array([0.1, 0.2]))).config["trained_betas"].HasField("list_value")


def test_a_noise_scheduler_can_be_named_by_class_and_configuration() -> None:
    config = checkpoints.ddim().config
    source = sent(denoised.EulerDiscreteScheduler.from_config(config, use_karras_sigmas=True))
    assert source.class_name == "EulerDiscreteScheduler"
    assert source.config["use_karras_sigmas"].bool_value is True
    assert source.config["beta_schedule"].string_value == "scaled_linear"
    source = sent(
        denoised.DDIMScheduler.from_pretrained("owner/name", subfolder="scheduler", timestep_spacing="trailing")
    )
    assert (source.repo_id, source.subfolder) == ("owner/name", "scheduler")
    assert source.config["timestep_spacing"].string_value == "trailing"


def test_a_part_of_a_live_pipeline_is_sent_as_one() -> None:
    part = denoised.LiveComponent(pipeline="pipelines/a", role="vae", class_name="AutoencoderKL", dtype="float16")
    assert sent(part) == pb.ComponentSource(pipeline="pipelines/a", role="vae")


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (torch.nn.Linear(1, 1), r"denoised\.Component"),
        (AutoencoderKL, r"denoised\.Component"),
        (checkpoints.tiny_vae(), r"denoised\.AutoencoderKL\.from_pretrained"),
        (object(), r"denoised\.Component"),
    ],
)
def test_objects_of_this_process_are_refused_with_what_to_do(value: object, hint: str) -> None:
    for given in (value, [value]):
        with pytest.raises(errors.UnsupportedError, match=hint):
            component.overrides({"vae": given})


def test_unknown_arguments_of_a_model_get_a_suggestion() -> None:
    with pytest.raises(errors.InvalidFieldError, match="Did you mean 'subfolder'"):
        denoised.ControlNetModel.from_pretrained("owner/name", subfoldr="x")
    with pytest.raises(errors.InvalidFieldError, match="float16"):
        denoised.ControlNetModel.from_pretrained("owner/name", torch_dtype="flaot16")
    assert denoised.ControlNetModel.from_pretrained("owner/name", low_cpu_mem_usage=True).repo_id == "owner/name"


def test_a_configuration_that_cannot_travel_is_refused() -> None:
    with pytest.raises(errors.InvalidFieldError, match="betas"):
        denoised.DDIMScheduler.from_config({"betas": object()})


def test_single_files_of_components_are_refused_with_what_to_do() -> None:
    with pytest.raises(errors.UnsupportedError, match="diffusers' own layout") as caught:
        denoised.AutoencoderKL.from_single_file("model.safetensors")
    assert "save_pretrained" in caught.value.hint

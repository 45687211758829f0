from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from denoised import component, errors, parameters, spec
from denoised.v1 import artifact_pb2


@pytest.mark.parametrize("dtype", [torch.float16, "float16", "torch.float16", "fp16", "half", np.float16])
def test_an_element_type_is_understood_however_it_is_said(dtype: Any) -> None:
    assert spec.dtype_number(dtype) == artifact_pb2.DATA_TYPE_FLOAT16


def test_no_element_type_leaves_it_to_the_daemon() -> None:
    assert spec.dtype_number(None) == artifact_pb2.DATA_TYPE_UNSPECIFIED


@pytest.mark.parametrize(
    ("dtype", "suggestion"), [("flaot16", "'float16'"), ("bloat16", "'bfloat16'"), ("auto", "Use")]
)
def test_a_wrong_element_type_gets_a_suggestion(dtype: str, suggestion: str) -> None:
    with pytest.raises(errors.InvalidFieldError, match=suggestion) as caught:
        spec.dtype_number(dtype)
    assert caught.value.metadata == {"field": "dtype"}


def test_weights_are_never_whole_numbers() -> None:
    with pytest.raises(errors.InvalidFieldError):
        spec.dtype_number(torch.int8)


def test_a_wrong_task_gets_a_suggestion() -> None:
    with pytest.raises(errors.InvalidFieldError, match="Did you mean 'inpainting'"):
        spec.task_number("inpaint")


@pytest.mark.parametrize(
    ("given", "repo_id", "file", "revision"),
    [
        ("https://huggingface.co/owner/name/blob/v1/model.safetensors", "owner/name", "model.safetensors", "v1"),
        ("hf.co/owner/name/resolve/main/a/model.safetensors", "owner/name", "a/model.safetensors", "main"),
        ("owner/name/a/model.safetensors", "owner/name", "a/model.safetensors", ""),
        ("/models/a/model.safetensors", "/models/a", "model.safetensors", ""),
        (Path("/models/a/b/model.safetensors"), "/models/a/b", "model.safetensors", ""),
    ],
)
def test_a_single_file_is_named_as_diffusers_names_it(given: Any, repo_id: str, file: str, revision: str) -> None:
    assert spec.single_file(given) == (repo_id, file, revision)


def test_a_single_file_of_this_directory_is_sent_with_an_absolute_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "model.safetensors").touch()
    expected = (str((tmp_path / "a" / "b").resolve()), "model.safetensors", "")
    assert spec.single_file("a/b/model.safetensors") == expected
    assert spec.single_file("./a/b/model.safetensors") == expected


def test_directories_are_sent_as_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model_index.json").write_text("{}")
    expected = str((tmp_path / "mine").resolve())
    assert spec.source("mine") == spec.source("./mine") == spec.source(Path("mine")) == expected


def test_a_directory_that_only_shares_a_name_with_a_model_is_not_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert spec.source("demo") == "demo"
    assert spec.source("owner/name") == "owner/name"


def test_arguments_are_told_from_replacements() -> None:
    settings, replaced = parameters.split_load_arguments(
        {
            "torch_dtype": "float16",
            "revision": None,
            "variant": "fp16",
            "safety_checker": None,
            "low_cpu_mem_usage": True,
        }
    )
    assert settings == {"dtype": "float16", "variant": "fp16"}
    assert replaced == {"safety_checker": None}


def test_the_newer_name_of_the_element_type_wins() -> None:
    assert parameters.split_load_arguments({"torch_dtype": "float16", "dtype": "bfloat16"})[0] == {"dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("torch_dtpye", "float16", "Did you mean 'torch_dtype'"),
        ("use_safetensor", True, "Did you mean 'use_safetensors'"),
        ("device_map", "auto", "The daemon decides"),
        ("output_loading_info", True, "report no missing"),
        ("trust_remote_code", True, "own classes only"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(name: str, value: object, hint: str) -> None:
    with pytest.raises(errors.InvalidFieldError, match=hint) as caught:
        parameters.split_load_arguments({name: value})
    assert caught.value.metadata == {"field": name}


def test_harmless_values_of_refused_arguments_pass() -> None:
    harmless = {name: allowed for name, (values, _) in parameters.REFUSED.items() for allowed in values}
    assert parameters.split_load_arguments(harmless) == ({}, {})


def test_objects_of_this_process_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"unet: a .*Linear lives in this process"):
        component.overrides({"unet": torch.nn.Linear(1, 1)})


def test_a_derived_pipeline_keeps_the_element_type() -> None:
    with pytest.raises(errors.InvalidFieldError, match="shares the weights"):
        parameters.split_derive_arguments({"torch_dtype": torch.float16})
    assert parameters.split_derive_arguments({"torch_dtype": None, "controlnet": None}) == ({}, {"controlnet": None})


def test_ids_alone_are_taken_for_handles() -> None:
    assert spec.full_name("apples") == spec.full_name("pipelines/apples") == "pipelines/apples"
    assert spec.full_name("") == ""


def test_a_revision_that_is_no_text_is_refused() -> None:
    with pytest.raises(errors.InvalidFieldError, match="revision"):
        parameters.split_load_arguments({"revision": 3})


def test_a_token_of_the_hub_is_sent_and_shown_nowhere() -> None:
    assert parameters.split_load_arguments({"token": "hf_x"}) == ({"hub_token": "hf_x"}, {})
    assert parameters.split_load_arguments({"token": True}) == parameters.split_load_arguments({"token": None})
    with pytest.raises(errors.InvalidFieldError) as caught:
        parameters.split_load_arguments({"token": b"hf_secret"})
    assert "secret" not in str(caught.value)


def test_element_types_are_one_or_the_files_own_or_one_for_each_component() -> None:
    float16, float32 = artifact_pb2.DATA_TYPE_FLOAT16, artifact_pb2.DATA_TYPE_FLOAT32
    assert spec.dtype_fields("auto") == {"component_dtypes": {}, "auto_dtype": True}
    assert spec.dtype_fields({"vae": torch.float32, "default": "float16"}) == {
        "component_dtypes": {"vae": float32},
        "dtype": float16,
    }
    with pytest.raises(errors.InvalidFieldError, match="float16"):
        spec.dtype_fields({"vae": "flaot16"})

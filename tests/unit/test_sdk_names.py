"""What is public, and that both halves of the SDK have it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import denoised
import denoised.aio
import pytest

ROOT = Path(__file__).parents[2]
PAIRS = [
    (denoised.Client, denoised.aio.AsyncClient),
    (denoised.Pipeline, denoised.aio.AsyncPipeline),
    (denoised.Stream, denoised.aio.AsyncStream),
    (denoised.AutoPipelineForText2Image, denoised.aio.AutoPipelineForText2Image),
    (denoised.AutoPipelineForImage2Image, denoised.aio.AutoPipelineForImage2Image),
    (denoised.AutoPipelineForInpainting, denoised.aio.AutoPipelineForInpainting),
]


@pytest.mark.parametrize("module", [denoised, denoised.aio])
def test_every_public_name_is_there_and_nothing_else(module: object) -> None:
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and (not inspect.ismodule(value) or name == "errors")
    }
    assert public | {"__version__"} == set(module.__all__) | {"__version__"}  # type: ignore[attr-defined]
    assert sorted(module.__all__) == list(module.__all__)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("blocking", "asynchronous"), PAIRS)
def test_both_halves_have_the_same_methods_and_parameters(blocking: type, asynchronous: type) -> None:
    names = [name for name in dir(blocking) if not name.startswith("_")]
    assert names == [name for name in dir(asynchronous) if not name.startswith("_")]
    for name in names:
        one, other = getattr(blocking, name), getattr(asynchronous, name)
        if callable(one):
            assert list(inspect.signature(one).parameters) == list(inspect.signature(other).parameters), name


def test_every_public_method_is_documented() -> None:
    for pair in PAIRS:
        for kind in pair:
            for name, value in vars(kind).items():
                if not name.startswith("_") and (callable(value) or isinstance(value, property | classmethod)):
                    assert inspect.getdoc(getattr(kind, name)), f"{kind.__name__}.{name}"


def test_the_blocking_half_is_what_the_table_makes_of_the_other() -> None:
    result = subprocess.run(
        [sys.executable, "client/unasync.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_importing_the_sdk_brings_neither_torch_nor_the_command_line_nor_the_daemon() -> None:
    program = (
        "import sys, denoised, denoised.aio; "
        "print([name for name in ('torch', 'typer', 'rich', 'denoised_server', 'diffusers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name", ["AutoPipelineForText2Image", "AutoPipelineForImage2Image", "AutoPipelineForInpainting"]
)
@pytest.mark.parametrize("module", [denoised, denoised.aio])
def test_an_auto_class_is_not_instantiated(module: object, name: str) -> None:
    kind = getattr(module, name)
    with pytest.raises(EnvironmentError, match=name) as caught:
        kind()
    assert str(caught.value) == (
        f"{name} is designed to be instantiated using the `{name}.from_pretrained(pretrained_model_name_or_path)` or "
        f"`{name}.from_pipe(pipeline)` methods."
    )
    assert kind.config_name == "model_index.json"

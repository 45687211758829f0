"""diffusers' own tests of its Auto classes, run against a daemon.

None of their code is here: a checkout of diffusers has it. Name one to run them:

    git clone --depth 1 https://github.com/huggingface/diffusers
    DIFFUSERS_SOURCE=$PWD/diffusers pytest tests/parity/test_somebody_elses.py

Their imports are pointed at denoised, and the repositories that they name at checkpoints built here.
"""

from __future__ import annotations

import ast
import os
import types
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import denoised
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from tests.daemon import Daemon

from .checkpoints import encoders, stable_diffusion, stable_diffusion_xl, tokenizers

SOURCE = os.environ.get("DIFFUSERS_SOURCE", "")
FILE = Path(SOURCE) / "tests" / "pipelines" / "test_pipelines_auto.py"
SUITE = "AutoPipelineFastTest"
# What the Hub's cache of this process holds is no matter to a daemon.
ABOUT_THE_CACHE = {"test_kwargs_local_files_only"}
HUB = "hf-internal-testing"

pytestmark = [
    pytest.mark.skipif(not FILE.is_file(), reason=f"set DIFFUSERS_SOURCE to a checkout of diffusers: {__doc__}"),
    pytest.mark.filterwarnings("ignore"),
]


def _names() -> list[str]:
    if not FILE.is_file():
        return []
    suite = next(node for node in ast.parse(FILE.read_text()).body if getattr(node, "name", "") == SUITE)
    assert isinstance(suite, ast.ClassDef)
    tests = [node.name for node in suite.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test")]
    return [name for name in tests if name not in ABOUT_THE_CACHE]


class _Pointed(ast.NodeTransformer):
    """Their module with other imports, and with folders for the names of repositories."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self._folders = folders

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        if node.level:
            # Only the marks of tests that need the network.
            return ast.parse("\n".join(f"{name.name} = unittest.skip('it needs the Hub')" for name in node.names)).body
        if node.module != "diffusers":
            return node
        ours = [name for name in node.names if name.name != "DiffusionPipeline"]
        theirs = [name for name in node.names if name.name == "DiffusionPipeline"]
        imports = [ast.ImportFrom("denoised", ours, 0), ast.ImportFrom("diffusers", theirs, 0)]
        return [each for each in imports if each.names]

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant(str(self._folders[node.value])) if node.value in self._folders else node


@pytest.fixture(scope="module")
def folders(checkpoint_dir: Path) -> dict[str, Path]:
    root = checkpoint_dir / "elsewhere"
    torch.manual_seed(0)
    plain = stable_diffusion.parts()
    tokenizer = tokenizers.clip()
    # One ControlNet is put on both families, so that both read texts of one width.
    narrow = stable_diffusion_xl.parts(cross_attention_dim=encoders.WIDTH) | {
        "text_encoder": encoders.clip_text(tokenizer, hidden_size=encoders.WIDTH // 2),
        "text_encoder_2": encoders.clip_text_with_projection(tokenizer, hidden_size=encoders.WIDTH // 2),
    }
    made: dict[str, Any] = {
        "tiny-stable-diffusion-torch": StableDiffusionPipeline(**plain),
        "tiny-stable-diffusion-xl-pipe": StableDiffusionXLPipeline(**narrow),
        "tiny-controlnet": ControlNetModel.from_unet(plain["unet"]),
        "image-encoder": encoders.clip_vision(),
    }
    for name, saved in made.items():
        saved.save_pretrained(root / name)
    stable_diffusion_xl.refiner(root / "tiny-stable-diffusion-xl-refiner-pipe")
    stable_diffusion_xl.inpainting(root / "tiny-stable-diffusion-xl-inpaint-pipe")
    return {f"{HUB}/{folder.name}": folder for folder in root.iterdir()}


@pytest.fixture(scope="module")
def suite(daemon: Daemon, folders: dict[str, Path]) -> Iterator[type[unittest.TestCase]]:
    module = types.ModuleType("test_pipelines_auto")
    tree = ast.fix_missing_locations(_Pointed(folders).visit(ast.parse(FILE.read_text())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENOISED_TARGET", daemon.target)
        exec(compile(tree, str(FILE), "exec"), vars(module))
        theirs: Any = getattr(module, SUITE)

        class Ours(theirs):  # type: ignore[misc]
            # A module of this process cannot travel; a reference to the same weights can.
            dummy_image_encoder = denoised.CLIPVisionModelWithProjection.from_pretrained(
                folders[f"{HUB}/image-encoder"]
            )

        yield Ours


@pytest.mark.parametrize("name", _names())
def test_their_test_passes(suite: type[unittest.TestCase], name: str) -> None:
    result = unittest.TestResult()
    suite(name).run(result)
    for _, trace in [*result.errors, *result.failures]:
        pytest.fail(trace)


def test_none_of_their_tests_is_left_out_without_a_word() -> None:
    assert len(_names()) > 10

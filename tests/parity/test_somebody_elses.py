"""diffusers' own tests, run against a daemon: those of its Auto classes, and those of values of any pipeline.

None of their code is here: a checkout of diffusers has it. Name one to run them:

    git clone --depth 1 https://github.com/huggingface/diffusers
    DIFFUSERS_SOURCE=$PWD/diffusers pytest tests/parity/test_somebody_elses.py

The imports of the former are pointed at denoised, and the repositories that they name at checkpoints built here. The
latter make pipelines of components: theirs are saved, and loaded by the daemon.
"""

from __future__ import annotations

import ast
import itertools
import os
import types
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import denoised
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from tests.daemon import Daemon

from .checkpoints import encoders, stable_diffusion, stable_diffusion_xl, tokenizers
from .checkpoints.family import mask

SOURCE = os.environ.get("DIFFUSERS_SOURCE", "")
FOLDER = Path(SOURCE) / "tests" / "pipelines"
AUTO, COMMON = FOLDER / "test_pipelines_auto.py", FOLDER / "test_pipelines_common.py"
SUITE = "AutoPipelineFastTest"
# What the Hub's cache of this process holds is no matter to a daemon.
ABOUT_THE_CACHE = {"test_kwargs_local_files_only"}
HUB = "hf-internal-testing"
# Those that look at what a call returns. The others reach into modules, files and devices of their process, into the
# image processor of the object (test_latents_input), which a pipeline of many callers cannot have.
VALUES = (
    "test_pt_np_pil_inputs_equivalent",
    "test_pt_np_pil_outputs_equivalent",
    "test_inference_batch_consistent",
    "test_inference_batch_single_identical",
    "test_dict_tuple_outputs_equivalent",
    "test_num_images_per_prompt",
    "test_cfg",
    "test_callback_inputs",
    "test_callback_cfg",
    "test_from_pipe_consistent_config",
    "test_from_pipe_consistent_forward_pass",
)
AUTO_CLASSES = {
    StableDiffusionPipeline: denoised.AutoPipelineForText2Image,
    StableDiffusionImg2ImgPipeline: denoised.AutoPipelineForImage2Image,
    StableDiffusionInpaintPipeline: denoised.AutoPipelineForInpainting,
}

pytestmark = [
    pytest.mark.skipif(
        not AUTO.is_file(), reason="DIFFUSERS_SOURCE names no checkout of diffusers: see the top of the file"
    ),
    pytest.mark.filterwarnings("ignore"),
]


def _names() -> list[str]:
    if not AUTO.is_file():
        return []
    suite = next(node for node in ast.parse(AUTO.read_text()).body if getattr(node, "name", "") == SUITE)
    assert isinstance(suite, ast.ClassDef)
    tests = [node.name for node in suite.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test")]
    return [name for name in tests if name not in ABOUT_THE_CACHE]


class _Pointed(ast.NodeTransformer):
    """Their module with other imports, and with folders for the names of repositories."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self._folders = folders

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        if node.level or node.module != "diffusers":
            # What they share with tests of theirs that do not run here is stood in for.
            return None if node.level else node
        ours = [name for name in node.names if name.name.startswith("Auto") or name.name == "ControlNetModel"]
        theirs = [name for name in node.names if name not in ours]
        imports = [ast.ImportFrom("denoised", ours, 0), ast.ImportFrom("diffusers", theirs, 0)]
        return [each for each in imports if each.names]

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant(str(self._folders[node.value])) if node.value in self._folders else node


def _mark(*given: Any) -> Any:
    """Stands in for their decorators, with arguments or without: tests that they mark are not among those that run."""
    return given[0] if len(given) == 1 and callable(given[0]) else lambda marked: marked


def _module(file: Path, folders: dict[str, Path]) -> types.ModuleType:
    tree = ast.parse(file.read_text())
    module = types.ModuleType(file.stem)
    relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    shared = [name.name for node in relative for name in node.names]
    vars(module).update(dict.fromkeys(shared, _mark))
    vars(module).update(torch_device="cpu", backend_empty_cache=lambda _device: None)
    exec(compile(ast.fix_missing_locations(_Pointed(folders).visit(tree)), str(file), "exec"), vars(module))
    return module


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENOISED_TARGET", daemon.target)
        theirs: Any = getattr(_module(AUTO, folders), SUITE)

        class Ours(theirs):  # type: ignore[misc]
            # A module of this process cannot travel; a reference to the same weights can.
            dummy_image_encoder = denoised.CLIPVisionModelWithProjection.from_pretrained(
                folders[f"{HUB}/image-encoder"]
            )

        yield Ours


def _run(suite: type[unittest.TestCase], name: str) -> None:
    result = unittest.TestResult()
    suite(name).run(result)
    assert result.testsRun == 1
    for _, trace in [*result.errors, *result.failures]:
        pytest.fail(trace)


@pytest.mark.parametrize("name", _names())
def test_their_test_of_auto_classes_passes(suite: type[unittest.TestCase], name: str) -> None:
    _run(suite, name)


def test_none_of_their_tests_is_left_out_without_a_word() -> None:
    assert len(_names()) > 10


def _remote(pipeline_class: Any, load: Callable[[Path], denoised.Pipeline], folder: Path) -> Any:
    """A class whose instances live in the daemon: what it is made of is saved, and loaded there."""
    numbers = itertools.count()

    def make(_class: Any, **components: Any) -> denoised.Pipeline:
        saved = folder / f"{next(numbers)}"
        pipeline_class(**components).save_pretrained(saved)
        return load(saved)

    auto = AUTO_CLASSES[pipeline_class]
    methods = {"__new__": make, "from_pretrained": auto.from_pretrained, "from_pipe": auto.from_pipe}
    return type(pipeline_class.__name__, (pipeline_class,), methods)


@pytest.fixture(scope="module")
def common(folders: dict[str, Path]) -> types.ModuleType:
    return _module(COMMON, folders)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("pipeline_class", AUTO_CLASSES, ids=lambda each: each.__name__)
def test_their_test_of_values_passes(
    common: types.ModuleType,
    daemon: Daemon,
    checkpoint_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    pipeline_class: Any,
    name: str,
) -> None:
    folder = checkpoint_dir / tmp_path_factory.mktemp("values").name
    with daemon.client() as client:
        made: list[denoised.Pipeline] = []

        def load(saved: Path) -> denoised.Pipeline:
            made.append(client.load(saved))
            return made[-1]

        mixins: Any = (
            common.PipelineLatentTesterMixin,
            common.PipelineFromPipeTesterMixin,
            common.PipelineTesterMixin,
            unittest.TestCase,
        )

        class Ours(*mixins):  # type: ignore[misc]
            batch_params = frozenset({"prompt", "negative_prompt", "image", "mask_image"})
            image_params = image_latents_params = frozenset({"image"})

            def get_dummy_components(self) -> dict[str, Any]:
                torch.manual_seed(0)
                return stable_diffusion.parts() | {"image_encoder": None}

            def get_dummy_inputs(self, device: str, seed: int = 0) -> dict[str, Any]:
                inputs: dict[str, Any] = {"prompt": "a cat on a mat", "num_inference_steps": 2, "guidance_scale": 6.0}
                inputs |= {"output_type": "np", "generator": torch.Generator().manual_seed(seed)}
                if pipeline_class is not StableDiffusionPipeline:
                    inputs |= {"image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))}
                if pipeline_class is StableDiffusionInpaintPipeline:
                    inputs |= {"mask_image": mask()}
                return inputs

        suite: Any = Ours
        suite.pipeline_class = _remote(pipeline_class, load, folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DENOISED_TARGET", daemon.target)
            # What they derive from.
            patch.setattr(
                common, "StableDiffusionPipeline", _remote(StableDiffusionPipeline, load, folder / "original")
            )
            _run(suite, name)
        for pipe in made:
            pipe.unload()

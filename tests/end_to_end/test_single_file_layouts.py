"""Single files of several families, with components of other types and from elsewhere, against a real daemon."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import denoised
import diffusers
import numpy as np
import pytest
import torch
from denoised import errors
from denoised_server.worker.families import MAPPINGS
from diffusers import AutoencoderKL, ControlNetModel, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file

from tests import single_file
from tests.daemon import Daemon
from tests.parity.checkpoints import encoders, qwen, stable_diffusion_3, stable_diffusion_xl
from tests.parity.checkpoints.family import mask, picture
from tests.parity.checkpoints.weights import filled
from tests.parity.pair import AUTO_CLASSES

# Text encoders of one family are told apart by their widths.
WIDER = {"hidden_size": 2 * encoders.WIDTH, "projection_dim": 2 * encoders.WIDTH}
TASKS = ("text-to-image", "image-to-image", "inpainting")


@dataclass(frozen=True)
class Layout:
    """A family, how a checkpoint of it is built, and how its weights are put into one file.

    `beside` are the components that its files do not have.
    """

    family: str
    build: Callable[[Path], object]
    save: Callable[[Path, Path], Path]
    beside: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.family


def _xl(folder: Path) -> None:
    width = 3 * encoders.WIDTH
    made = stable_diffusion_xl.parts(
        cross_attention_dim=width, projection_class_embeddings_input_dim=6 * 8 + 2 * encoders.WIDTH
    )
    made["text_encoder_2"] = encoders.clip_text_with_projection(made["tokenizer"], **WIDER)
    diffusers.StableDiffusionXLPipeline(**made, add_watermarker=False).save_pretrained(folder)


def _three(folder: Path) -> None:
    made = stable_diffusion_3.parts()
    made["text_encoder_2"] = encoders.clip_text_with_projection(made["tokenizer"], **WIDER)
    shape = stable_diffusion_3.SHAPE | {"pooled_projection_dim": 3 * encoders.WIDTH}
    made["transformer"] = filled(SD3Transformer2DModel(**shape))
    diffusers.StableDiffusion3Pipeline(**made).save_pretrained(folder)


LAYOUTS = [
    Layout("stable-diffusion-xl", _xl, single_file.save_xl),
    Layout("stable-diffusion-3", _three, single_file.save_3),
    Layout("z-image", qwen.z_image, single_file.save_z_image, beside=("vae", "text_encoder")),
]


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def layout(request: pytest.FixtureRequest) -> Layout:
    found: Layout = request.param
    return found


@pytest.fixture(scope="module")
def file(layout: Layout, checkpoint_dir: Path) -> Path:
    """The file, beside a folder that describes it and has the weights that it lacks."""
    folder = checkpoint_dir / "layouts" / layout.family
    torch.manual_seed(0)
    layout.build(folder / "config")
    made = layout.save(folder / "config", folder / "weights.safetensors")
    for weights in (folder / "config").glob("*/*.safetensors"):
        if weights.parent.name not in layout.beside:
            weights.unlink()
    return made


def _config(file: Path) -> Path:
    return file.parent / "config"


def _local(pipeline_class: Any, file: Path, **given: Any) -> Any:
    options = {"config": str(_config(file)), "local_files_only": True, "torch_dtype": torch.float32}
    pipe = pipeline_class.from_single_file(file, **options | given)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            # diffusers leaves T5's dropout on, and draws another picture each time.
            part.eval()
    return pipe


def _call(task: str, **more: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "np"}
    usual |= {"height": 32, "width": 32} if task == "text-to-image" else {"image": picture(32), "strength": 0.8}
    return usual | ({"mask_image": mask(32)} if task == "inpainting" else {}) | more


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_each_task_of_a_family_gives_what_diffusers_gives(
    daemon: Daemon, held: Callable[[], int], layout: Layout, file: Path
) -> None:
    with daemon.client() as client:
        sizes = set()
        for task in TASKS:
            there = getattr(denoised, AUTO_CLASSES[task]).from_single_file(file, config=_config(file), client=client)
            given = {}
            for role in layout.beside:
                library, class_name = diffusers.DiffusionPipeline.load_config(_config(file))[role]
                kind = getattr(importlib.import_module(library), class_name)
                given[role] = kind.from_pretrained(_config(file) / role)
            here = _local(MAPPINGS[task][layout.family], file, **given)
            assert type(there).__name__ == type(here).__name__
            made = there(**_call(task), generator=_seeded(), batching="forbid").images
            np.testing.assert_array_equal(made, here(**_call(task), generator=_seeded()).images)
            sizes.add(held())
        # Three loads of one file take no more than one does.
        assert len(sizes) == 1


@pytest.mark.parametrize("layout", LAYOUTS[:1], ids=str, indirect=True)
class TestOfStableDiffusionXL:
    """What all families have, on one of them."""

    def test_components_may_have_element_types_of_their_own(
        self, daemon: Daemon, held: Callable[[], int], file: Path
    ) -> None:
        # diffusers takes one type for all: what has another comes from another pipeline.
        pipeline_class = diffusers.StableDiffusionXLPipeline
        encoder = _local(pipeline_class, file, torch_dtype=torch.bfloat16).text_encoder
        here = _local(pipeline_class, file, text_encoder=encoder)
        with daemon.client() as client:
            there = denoised.AutoPipelineForText2Image.from_single_file(
                file, config=_config(file), torch_dtype={"text_encoder": torch.bfloat16}, client=client
            )
            found = {role: part.dtype for role, part in there.components.items() if part.digest}
            assert found == dict.fromkeys(found, "float32") | {"text_encoder": "bfloat16"}
            made = there(**_call("text-to-image"), generator=_seeded(), batching="forbid").images
            np.testing.assert_array_equal(made, here(**_call("text-to-image"), generator=_seeded()).images)

    def test_a_controlnet_and_other_components_are_given_by_reference(
        self, daemon: Daemon, held: Callable[[], int], file: Path
    ) -> None:
        folder = file.parent
        torch.manual_seed(1)
        shape = UNet2DConditionModel.load_config(_config(file), subfolder="unet")
        net = filled(ControlNetModel.from_unet(UNet2DConditionModel.from_config(shape)))
        net.save_pretrained(folder / "controlnet")
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(_config(file), subfolder="vae")).eval()
        vae.save_pretrained(folder / "vae")
        scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(_config(file), subfolder="scheduler")
        here = _local(diffusers.StableDiffusionXLControlNetPipeline, file, controlnet=net, vae=vae, scheduler=scheduler)
        with daemon.client() as client:
            there = denoised.AutoPipelineForText2Image.from_single_file(
                file,
                config=_config(file),
                controlnet=denoised.ControlNetModel.from_pretrained(folder / "controlnet"),
                vae=denoised.AutoencoderKL.from_pretrained(folder / "vae"),
                scheduler=scheduler,
                client=client,
            )
            assert type(there).__name__ == "StableDiffusionXLControlNetPipeline"
            call = _call("text-to-image", image=picture(32, turned=True))
            made = there(**call, generator=_seeded(), batching="forbid").images
            np.testing.assert_array_equal(made, here(**call, generator=_seeded()).images)
            perturbed = denoised.AutoPipelineForText2Image.from_single_file(
                file, config=_config(file), enable_pag=True, client=client
            )
            assert type(perturbed).__name__ == "StableDiffusionXLPAGPipeline"

    def test_what_cannot_be_is_refused_with_the_reason(
        self, daemon: Daemon, held: Callable[[], int], checkpoint_dir: Path, sd_checkpoint: Path, file: Path
    ) -> None:
        net = denoised.ControlNetModel.from_pretrained(sd_checkpoint)
        bare = Path(shutil.copytree(_config(file), checkpoint_dir / "layouts" / "bare", dirs_exist_ok=True))
        shutil.rmtree(bare / "vae")
        good: dict[str, Any] = {"single_file": file.name, "config": _config(file), "task": "text-to-image"}
        save_file({"of_no_model": torch.zeros(1)}, file.parent / "nothing.safetensors")
        nothing = good | {"single_file": "nothing.safetensors", "config": sd_checkpoint}
        with daemon.client() as client:
            for error, match, options in (
                (errors.InvalidFieldError, "without a task", good | {"task": "", "overrides": {"controlnet": net}}),
                (errors.NotAPipelineError, "Nothing of a StableDiffusionPipeline", nothing),
                (errors.NotAPipelineError, "vae", good | {"config": bare}),
                (errors.InvalidFieldError, "not quantised", good | {"quantization_config": QUANTIZED}),
            ):
                with pytest.raises(error, match=match) as caught:
                    client.load(file.parent, **options)
                assert caught.value.hint
                assert held() == 0


QUANTIZED = {"unet": {"quant_method": "quanto", "weights_dtype": "int8"}}

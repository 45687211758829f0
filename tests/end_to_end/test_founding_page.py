"""The examples of diffusers' AutoPipeline page (v0.26), with one changed import line.

Each example makes the page's own calls. Its checkpoint names are in the daemon's Hub cache, holding small checkpoints.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from denoised import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
from PIL import Image

from tests.daemon import Daemon
from tests.parity.checkpoints import deepfloyd

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IF_REPO_ID = "DeepFloyd/IF-I-XL-v1.0"
REPO_ID = "runwayml/stable-diffusion-v1-5"
PROMPT = "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k"


@pytest.fixture(scope="module", autouse=True)
def daemon(tmp_path_factory: pytest.TempPathFactory, sd_checkpoint: Path) -> Iterator[Daemon]:
    cache = tmp_path_factory.mktemp("hub")
    deepfloyd.build(pixels := tmp_path_factory.mktemp("checkpoints") / "if")
    for repo_id, folder in ((REPO_ID, sd_checkpoint), (IF_REPO_ID, pixels)):
        repository = cache / f"models--{repo_id.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    with Daemon(tmp_path_factory.mktemp("state"), HF_HUB_CACHE=str(cache)) as running:
        os.environ["DENOISED_TARGET"] = running.target
        yield running
        del os.environ["DENOISED_TARGET"]


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray((np.indices((64, 64)).sum(0) * 2).astype("uint8")).convert("RGB")


@pytest.fixture
def mask_image() -> Image.Image:
    return Image.new("L", (64, 64), 255)


def test_the_first_example() -> None:
    with pytest.warns(UserWarning, match="stays as it is"):
        pipeline = AutoPipelineForText2Image.from_pretrained(
            "runwayml/stable-diffusion-v1-5", torch_dtype=torch.float16, use_safetensors=True
        ).to("cuda")
    made = pipeline(PROMPT, num_inference_steps=25).images[0]
    assert made.size == (64, 64)
    assert pipeline.dtype == torch.float16
    assert pipeline.info.spec.revision == COMMIT


def test_text_to_image_from_pretrained() -> None:
    pipeline = AutoPipelineForText2Image.from_pretrained("runwayml/stable-diffusion-v1-5")
    assert isinstance(pipeline(PROMPT).images[0], Image.Image)


def test_text_to_image_from_pipe() -> None:
    pipe_i2i = AutoPipelineForImage2Image.from_pretrained(
        "runwayml/stable-diffusion-v1-5", requires_safety_checker=False
    )
    pipe_t2i = AutoPipelineForText2Image.from_pipe(pipe_i2i)
    assert isinstance(pipe_t2i(PROMPT).images[0], Image.Image)


def test_image_to_image_from_pretrained(image: Image.Image) -> None:
    pipeline = AutoPipelineForImage2Image.from_pretrained("runwayml/stable-diffusion-v1-5")
    assert isinstance(pipeline(PROMPT, image).images[0], Image.Image)


def test_image_to_image_from_pipe(image: Image.Image) -> None:
    pipe_t2i = AutoPipelineForText2Image.from_pretrained(
        "runwayml/stable-diffusion-v1-5", requires_safety_checker=False
    )
    pipe_i2i = AutoPipelineForImage2Image.from_pipe(pipe_t2i)
    assert isinstance(pipe_i2i(PROMPT, image).images[0], Image.Image)


def test_inpainting_from_pretrained(image: Image.Image, mask_image: Image.Image) -> None:
    pipeline = AutoPipelineForInpainting.from_pretrained("runwayml/stable-diffusion-v1-5")
    assert isinstance(pipeline(PROMPT, image=image, mask_image=mask_image).images[0], Image.Image)


def test_inpainting_from_pipe(image: Image.Image, mask_image: Image.Image) -> None:
    pipe_t2i = AutoPipelineForText2Image.from_pretrained("DeepFloyd/IF-I-XL-v1.0", requires_safety_checker=False)
    pipe_inpaint = AutoPipelineForInpainting.from_pipe(pipe_t2i)
    made = pipe_inpaint(PROMPT, image=image, mask_image=mask_image)
    assert pipe_inpaint.info.pipeline_class == "IFInpaintingPipeline"
    assert isinstance(made.images[0], Image.Image)


PAGE = os.environ.get("DENOISED_FOUNDING_PAGE", "")


@pytest.mark.skipif(not PAGE, reason="DENOISED_FOUNDING_PAGE names no copy of diffusers' AutoPipeline page (v0.26)")
@pytest.mark.filterwarnings("ignore:.*stays as it is")
def test_the_code_blocks_of_the_page_itself(image: Image.Image, mask_image: Image.Image) -> None:
    page = Path(PAGE).read_text(encoding="utf-8", errors="replace")
    blocks = [block for block in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if "from diffusers import" in block]
    assert len(blocks) == 7
    for block in blocks:
        code = re.sub(r"^(>>>|\.\.\.) ?", "", block, flags=re.MULTILINE)
        code = code.replace("from diffusers import", "from denoised import")
        names: dict[str, Any] = {"prompt": PROMPT, "image": image, "init_image": image, "mask_image": mask_image}
        exec(compile(code, "the page", "exec"), names)
        assert isinstance(names["image"], Image.Image)
        assert names["image"] is not image


@pytest.mark.parametrize("auto", [AutoPipelineForText2Image, AutoPipelineForImage2Image, AutoPipelineForInpainting])
def test_an_auto_class_cannot_be_instantiated(auto: type) -> None:
    with pytest.raises(EnvironmentError, match="from_pretrained"):
        auto()

"""What a daemon answers to what it cannot do: the right code, a reason, a hint, at once; and it goes on serving.

Spoken over bare gRPC, so that no check of the SDK's own comes first.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from denoised import media
from denoised.status import DETAILS_KEY
from denoised.v1 import (
    artifact_pb2,
    generation_service_pb2,
    generation_service_pb2_grpc,
    pipeline_service_pb2,
    pipeline_service_pb2_grpc,
)
from denoised.values import artifact_to_proto, to_proto
from google.rpc import error_details_pb2, status_pb2
from PIL import Image

from tests import checkpoints
from tests.daemon import Daemon

UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
PICTURE = Image.new("RGB", (64, 64), (200, 80, 20))
MASK = Image.new("L", (64, 64), 255)
Spec = pipeline_service_pb2.PipelineSpec
Sampling = generation_service_pb2.Sampling


@pytest.fixture(scope="module")
def broken(checkpoint_dir: Path) -> dict[str, Path]:
    """Checkpoints that cannot be loaded, by what is wrong with them."""
    empty = checkpoint_dir / "empty"
    empty.mkdir()
    truncated = checkpoints.stable_diffusion(checkpoint_dir / "truncated")
    weights = truncated / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    lumina = checkpoints.stable_diffusion(checkpoint_dir / "lumina")
    index = json.loads((lumina / "model_index.json").read_text())
    (lumina / "model_index.json").write_text(json.dumps(index | {"_class_name": "LuminaPipeline"}))
    return {"empty": empty, "truncated": truncated, "lumina": lumina, "missing": checkpoint_dir / "missing"}


class Wire:
    """Bare stubs, and what a failed call carries."""

    def __init__(self, target: str) -> None:
        self.channel = grpc.insecure_channel(target, UNLIMITED)
        self.pipelines = pipeline_service_pb2_grpc.PipelineServiceStub(self.channel)
        self.generations = generation_service_pb2_grpc.GenerationServiceStub(self.channel)

    def load(self, spec: Spec, **more: Any) -> pipeline_service_pb2.Pipeline:
        request = pipeline_service_pb2.LoadPipelineRequest(spec=spec, **more)
        return list(self.pipelines.LoadPipeline(request, timeout=60))[-1].pipeline

    def generate(self, pipeline: str, **more: Any) -> list[generation_service_pb2.GenerateResponse]:
        request = generation_service_pb2.GenerateRequest(pipeline=pipeline, **more)
        return list(self.generations.Generate(request, timeout=60))


@pytest.fixture(scope="module")
def wire(daemon: Daemon) -> Iterator[Wire]:
    wire = Wire(daemon.target)
    yield wire
    wire.channel.close()


def refusal(call: Callable[[], object]) -> tuple[str, str, dict[str, str]]:
    """Code, reason and metadata of a call that fails at once."""
    start = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        call()
    took = time.monotonic() - start
    # Milliseconds on a quiet machine; the bound is for one that is busy with other things.
    assert took < 5, f"it took {took:.2f} s to say no"
    error: Any = caught.value
    details = dict(error.trailing_metadata())[DETAILS_KEY]
    status, info = status_pb2.Status.FromString(details), error_details_pb2.ErrorInfo()
    (any_info,) = [each for each in status.details if each.Is(info.DESCRIPTOR)]
    any_info.Unpack(info)
    assert info.domain == "denoised"
    assert status.code == error.code().value[0]
    assert error.details().endswith((".", "?")), "a sentence"
    assert "Traceback" not in error.details()
    assert "site-packages" not in error.details()
    return error.code().name, info.reason, dict(info.metadata)


def component(**source: Any) -> Callable[[dict[str, Path]], Spec]:
    override = pipeline_service_pb2.Override(component=pipeline_service_pb2.ComponentSource(**source))
    return lambda broken: Spec(repo_id="demo", overrides={"vae": override})


BAD_LOADS = {
    "no such repository": (lambda b: Spec(repo_id="nobody/nothing"), "NOT_FOUND", "REPO_NOT_FOUND"),
    "no such directory": (lambda b: Spec(repo_id=str(b["missing"])), "NOT_FOUND", "REPO_NOT_FOUND"),
    "a directory outside": (lambda b: Spec(repo_id="/etc"), "PERMISSION_DENIED", "SOURCE_NOT_ALLOWED"),
    "dots": (lambda b: Spec(repo_id=f"{b['empty']}/../../../../etc"), "PERMISSION_DENIED", "SOURCE_NOT_ALLOWED"),
    "no pipeline": (lambda b: Spec(repo_id=str(b["empty"])), "FAILED_PRECONDITION", "NOT_A_PIPELINE"),
    "damaged weights": (lambda b: Spec(repo_id=str(b["truncated"])), "FAILED_PRECONDITION", "DAMAGED_WEIGHTS"),
    "a task the family lacks": (
        lambda b: Spec(repo_id=str(b["lumina"]), task=pipeline_service_pb2.TASK_INPAINTING),
        "FAILED_PRECONDITION",
        "TASK_NOT_SUPPORTED",
    ),
    "no source": (lambda b: Spec(), "INVALID_ARGUMENT", "INVALID_FIELD"),
    "an unknown dtype": (lambda b: Spec(repo_id="demo", dtype=99), "INVALID_ARGUMENT", "INVALID_FIELD"),  # type: ignore[arg-type]
    "an integer dtype": (
        lambda b: Spec(repo_id="demo", dtype=artifact_pb2.DATA_TYPE_INT8),
        "INVALID_ARGUMENT",
        "INVALID_FIELD",
    ),
    "an unknown task": (lambda b: Spec(repo_id="demo", task=99), "INVALID_ARGUMENT", "INVALID_FIELD"),  # type: ignore[arg-type]
    "an unknown dtype of a component": (
        lambda b: Spec(repo_id="demo", component_dtypes={"vae": artifact_pb2.DATA_TYPE_INT8}),
        "INVALID_ARGUMENT",
        "INVALID_FIELD",
    ),
    "a dtype of an unknown component": (
        lambda b: Spec(repo_id="demo", component_dtypes={"vea": artifact_pb2.DATA_TYPE_FLOAT16}),
        "INVALID_ARGUMENT",
        "INVALID_FIELD",
    ),
    "a subfolder outside": (
        lambda b: Spec(repo_id=str(b["truncated"]), subfolder="../../.."),
        "PERMISSION_DENIED",
        "SOURCE_NOT_ALLOWED",
    ),
    "a subfolder that is not there": (
        lambda b: Spec(repo_id=str(b["truncated"]), subfolder="nothing"),
        "FAILED_PRECONDITION",
        "NOT_A_PIPELINE",
    ),
    "a component outside": (component(repo_id="/etc"), "PERMISSION_DENIED", "SOURCE_NOT_ALLOWED"),
    "a component of nothing": (component(), "INVALID_ARGUMENT", "INVALID_FIELD"),
    "a component of two places": (
        component(repo_id="demo", pipeline="pipelines/a", role="vae"),
        "INVALID_ARGUMENT",
        "INVALID_FIELD",
    ),
    "a part of a pipeline that is not there": (
        component(pipeline="pipelines/none", role="vae"),
        "NOT_FOUND",
        "PIPELINE_NOT_FOUND",
    ),
    "a part without a role": (component(pipeline="pipelines/none"), "INVALID_ARGUMENT", "INVALID_FIELD"),
    "a class that there is not": (
        component(repo_id="demo", subfolder="vae", class_name="AutoencoderKLM"),
        "INVALID_ARGUMENT",
        "INVALID_FIELD",
    ),
    "another kind of component": (component(repo_id="demo", subfolder="unet"), "INVALID_ARGUMENT", "INVALID_FIELD"),
    "no components": (
        lambda b: Spec(
            repo_id="demo",
            overrides={"controlnet": pipeline_service_pb2.Override(components=pipeline_service_pb2.ComponentList())},
        ),
        "INVALID_ARGUMENT",
        "INVALID_FIELD",
    ),
    "an unknown component": (
        lambda b: Spec(
            repo_id=str(b["truncated"]),
            overrides={"safty_checker": pipeline_service_pb2.Override(value=to_proto(None))},
        ),
        "INVALID_ARGUMENT",
        "INVALID_FIELD",
    ),
}


@pytest.mark.parametrize(("spec", "code", "reason"), BAD_LOADS.values(), ids=BAD_LOADS)
def test_bad_loads(
    daemon: Daemon, wire: Wire, broken: dict[str, Path], spec: Callable[[dict[str, Path]], Spec], code: str, reason: str
) -> None:
    held = daemon.client().workers()[0].memory
    found_code, found_reason, metadata = refusal(lambda: wire.load(spec(broken)))
    assert (found_code, found_reason) == (code, reason)
    if reason != "REPO_NOT_FOUND":
        assert metadata.get("hint")
    now = daemon.client().workers()[0].memory
    assert (now.weight_bytes, now.reserved_bytes) == (held.weight_bytes, held.reserved_bytes)


def test_a_bad_id_and_a_bad_lease(wire: Wire, sd_checkpoint: Path) -> None:
    spec = Spec(repo_id=str(sd_checkpoint))
    for more in ({"pipeline_id": "Not An Id"}, {"request_id": "x" * 200}, {"ttl": {"seconds": -5}}):
        assert refusal(lambda more=more: wire.load(spec, **more))[:2] == ("INVALID_ARGUMENT", "INVALID_FIELD")  # type: ignore[misc]


def test_a_token_that_is_none(wire: Wire) -> None:
    for token in ("hf_\r\nHost: elsewhere", "hf_ü", "x" * 2000):
        assert refusal(lambda token=token: wire.load(Spec(repo_id="demo"), hub_token=token))[:2] == (  # type: ignore[misc]
            "INVALID_ARGUMENT",
            "INVALID_FIELD",
        )


def test_weights_that_can_never_fit(tmp_path: Path, checkpoint_dir: Path, sd_checkpoint: Path) -> None:
    config = tmp_path / "denoised.toml"
    config.write_text('memory_budget = "1000000"\n')
    with Daemon(tmp_path / "state", "--config", str(config), allow=[checkpoint_dir]) as running:
        wire = Wire(running.target)
        code, reason, metadata = refusal(lambda: wire.load(Spec(repo_id=str(sd_checkpoint))))
        assert (code, reason) == ("FAILED_PRECONDITION", "NEVER_FITS")
        assert int(metadata["needed_bytes"]) > int(metadata["budget_bytes"]) == 1_000_000
        wire.channel.close()


@pytest.fixture(scope="module")
def pipeline(wire: Wire, sd_checkpoint: Path) -> Iterator[str]:
    source = wire.load(Spec(repo_id=str(sd_checkpoint), task=pipeline_service_pb2.TASK_TEXT_TO_IMAGE))
    derivation = pipeline_service_pb2.Derivation(task=pipeline_service_pb2.TASK_INPAINTING)
    derived = wire.pipelines.DerivePipeline(
        pipeline_service_pb2.DerivePipelineRequest(source=source.name, derivation=derivation)
    )
    yield derived.pipeline.name
    for name in (source.name, derived.pipeline.name):
        wire.pipelines.UnloadPipeline(pipeline_service_pb2.UnloadPipelineRequest(name=name))


def good() -> dict[str, Any]:
    return {
        "prompt": "a cat",
        "image": artifact_to_proto(media.pack_image(PICTURE)),
        "mask_image": artifact_to_proto(media.pack_image(MASK)),
        "sampling": Sampling(num_inference_steps=3, height=64, width=64, seeds=[1]),
        "batching": generation_service_pb2.BATCHING_FORBID,
    }


def sampling(**fields: Any) -> dict[str, Any]:
    return {"sampling": Sampling(**({"num_inference_steps": 3, "height": 64, "width": 64} | fields))}


def argument(**arguments: Any) -> dict[str, Any]:
    return {"arguments": {name: to_proto(media.pack(value)) for name, value in arguments.items()}}


NOT_AN_IMAGE = artifact_pb2.Artifact(media_type="image/png", data=b"nonsense")
INVALID = ("INVALID_ARGUMENT", "INVALID_FIELD")
BAD_CALLS = {
    "an unknown argument": (argument(num_inferense_steps=3), ("INVALID_ARGUMENT", "UNKNOWN_ARGUMENT")),
    "an argument twice": (argument(prompt="a dog"), INVALID),
    "a number as text": ({**argument(num_inference_steps="ten"), "sampling": Sampling()}, INVALID),
    "text as a number": ({**argument(negative_prompt=7)}, INVALID),
    "a truth value as a number": (argument(eta=True), INVALID),
    "a generator": (argument(generator=3), INVALID),
    "no image at all": ({"image": None}, ("INVALID_ARGUMENT", "PIPELINE_REJECTED")),
    "an image that is none": ({"image": NOT_AN_IMAGE}, ("INVALID_ARGUMENT", "INVALID_MEDIA")),
    "an image of unknown type": (
        {"image": artifact_pb2.Artifact(media_type="text/plain", data=b"x")},
        ("INVALID_ARGUMENT", "INVALID_MEDIA"),
    ),
    "a mask of another size": ({"mask_image": artifact_to_proto(media.pack_image(MASK.resize((32, 32))))}, INVALID),
    "zero pixels": (sampling(height=0), INVALID),
    "minus pixels": (sampling(width=-64), INVALID),
    "100,000 pixels": (sampling(height=100_000, width=100_000), INVALID),
    "pixels not in eights": (sampling(height=63), ("INVALID_ARGUMENT", "PIPELINE_REJECTED")),
    "no steps": (sampling(num_inference_steps=0), INVALID),
    "minus steps": (sampling(num_inference_steps=-1), INVALID),
    "too many steps": (sampling(num_inference_steps=100_000), INVALID),
    "too strong": (sampling(strength=1.5), INVALID),
    "guidance that is no number": (sampling(guidance_scale=math.nan), INVALID),
    "too many images": (sampling(num_images_per_prompt=1000), INVALID),
    "more seeds than images": (sampling(seeds=[1, 2, 3]), INVALID),
    "a prompt of 1 MB": ({"prompt": "x" * 1_000_000}, INVALID),
    "a prompt of 1 MB in a list": ({"prompt": None, **argument(prompt=["x" * 1_000_000])}, INVALID),
    "an unknown output type": ({"output": {"output_type": "gif"}}, INVALID),
    "an unknown media type": ({"output": {"media_type": "image/bmp"}}, INVALID),
    "an unknown batching": ({"batching": 99}, INVALID),
    "a priority out of range": ({"priority": 1000}, INVALID),
    "embeddings of the wrong shape": (
        {"prompt": None, **argument(prompt_embeds=np.zeros((1, 77, 32), "float32"))},
        None,
    ),
    "a message over the limit": (
        {"image": artifact_pb2.Artifact(media_type="image/png", data=bytes(70 * 2**20))},
        ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE"),
    ),
}


def image_of(events: list[generation_service_pb2.GenerateResponse]) -> bytes:
    return next(event.output.artifact.data for event in events if event.HasField("output"))


@pytest.mark.parametrize(("change", "expected"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(
    daemon: Daemon, wire: Wire, pipeline: str, change: dict[str, Any], expected: tuple[str, str] | None
) -> None:
    before = image_of(wire.generate(pipeline, **good()))
    asked = {name: value for name, value in (good() | change).items() if value is not None}
    code, reason, metadata = refusal(lambda: wire.generate(pipeline, **asked))
    if expected is not None:
        assert (code, reason) == expected
    else:
        assert code == "INVALID_ARGUMENT"
    if reason == "UNKNOWN_ARGUMENT":
        assert metadata["suggestion"] == "num_inference_steps"
    assert image_of(wire.generate(pipeline, **good())) == before
    assert daemon.client().workers()[0].running_count == 0


def test_unknown_and_malformed_handles(wire: Wire) -> None:
    for name, expected in (
        ("pipelines/none", ("NOT_FOUND", "PIPELINE_NOT_FOUND")),
        ("", INVALID),
        ("models/none", INVALID),
    ):
        calls = (
            lambda name=name: wire.generate(name, prompt="a"),
            lambda name=name: wire.pipelines.GetPipeline(pipeline_service_pb2.GetPipelineRequest(name=name)),
            lambda name=name: wire.pipelines.RenewPipeline(pipeline_service_pb2.RenewPipelineRequest(name=name)),
            lambda name=name: wire.pipelines.UnloadPipeline(pipeline_service_pb2.UnloadPipelineRequest(name=name)),
            lambda name=name: wire.pipelines.DerivePipeline(
                pipeline_service_pb2.DerivePipelineRequest(
                    source=name, derivation=pipeline_service_pb2.Derivation(task=pipeline_service_pb2.TASK_INPAINTING)
                )
            ),
        )
        for call in calls:
            assert refusal(call)[:2] == expected


def test_a_bad_page_token(wire: Wire) -> None:
    request = pipeline_service_pb2.ListPipelinesRequest(page_token="nonsense")
    assert refusal(lambda: wire.pipelines.ListPipelines(request))[:2] == INVALID


def test_nothing_of_this_is_in_the_log(daemon: Daemon) -> None:
    """Runs last in this file: what clients did wrong is no error of the daemon's."""
    log = "".join(daemon.log)
    assert "Traceback" not in log
    assert "a cat" not in log

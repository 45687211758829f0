"""Every method, with requests drawn from the protos, good ones bent, and bytes that are no message at all."""

from __future__ import annotations

import io
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from denoised.v1 import generation_service_pb2 as generation_pb
from denoised.v1 import pipeline_service_pb2 as pipeline_pb
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.fuzz import IS_LONG
from tests.fuzz.strategies import messages
from tests.fuzz.target import METHODS, VICTIM, Target

CASES = 2000 if IS_LONG else 60
CHECK_EVERY = 200 if IS_LONG else 40
MAX_GROWTH = 400 * 2**20
WORDS = (
    VICTIM,
    "pipelines/witness",
    "demo",
    "text-to-image",
    "prompt",
    "negative_prompt",
    "num_inference_steps",
    "prompt_embeds",
    "guidance_scale",
    "generator",
    "image",
    "unet",
    "vae",
    "scheduler",
    "safety_checker",
    "EulerDiscreteScheduler",
    "pil",
    "latent",
    "np",
    "cpu",
)
# How a run of the long mode ends up in the docs.
REPORT = Path("out/fuzz.txt")
SLOWEST = 5


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, sd_checkpoint: Path) -> Iterator[Target]:
    running = Target(tmp_path_factory.mktemp("fuzz"), sd_checkpoint)
    try:
        yield running
    finally:
        running.close()


def good(path: str, checkpoint: Path) -> Message:
    """A request that works, to be bent; of methods that are not named here, the empty one."""
    task = pipeline_pb.TASK_TEXT_TO_IMAGE
    sampling = generation_pb.Sampling(num_inference_steps=2, height=64, width=64, seeds=[1])
    derivation = pipeline_pb.Derivation(task=pipeline_pb.TASK_IMAGE_TO_IMAGE)
    generate = generation_pb.GenerateRequest(pipeline=VICTIM, prompt="a cat", sampling=sampling)
    start = generation_pb.GenerateInteractivelyRequest.Start(
        request=generate, callbacks={"callback_on_step_end": generation_pb.Callback(tensor_inputs=["latents"])}
    )
    known: dict[str, Message] = {
        "LoadPipeline": pipeline_pb.LoadPipelineRequest(
            spec=pipeline_pb.PipelineSpec(repo_id=str(checkpoint), task=task)
        ),
        "DerivePipeline": pipeline_pb.DerivePipelineRequest(source=VICTIM, derivation=derivation),
        "UpdatePipeline": pipeline_pb.UpdatePipelineRequest(
            name=VICTIM, update_mask=FieldMask(paths=["noise_scheduler"])
        ),
        "Generate": generate,
        "GenerateInteractively": generation_pb.GenerateInteractivelyRequest(start=start),
    }
    empty: Any = GetMessageClass(METHODS[path].input_type)()
    for field in empty.DESCRIPTOR.fields:
        if field.name in ("name", "pipeline", "source") and field.type == field.TYPE_STRING:
            setattr(empty, field.name, VICTIM)
    found: Message = known.get(path.rpartition("/")[2], empty)
    return found


@st.composite
def requests(draw: st.DrawFn, path: str, checkpoint: Path) -> bytes:
    """Bytes of one request."""
    kind = draw(st.sampled_from(["drawn", "bent", "bent", "broken", "raw"]))
    if kind == "raw":
        return draw(st.binary(max_size=300))
    drawn = draw(messages(METHODS[path].input_type, WORDS))
    if kind == "drawn":
        return drawn.SerializeToString()
    whole = type(drawn)()
    whole.CopyFrom(good(path, checkpoint))
    if kind == "bent":
        whole.MergeFrom(drawn)
        return whole.SerializeToString()
    data = bytearray(whole.SerializeToString())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return bytes(data)


@pytest.mark.parametrize("path", sorted(METHODS))
def test_whatever_is_sent_is_answered_and_harms_nobody(target: Target, path: str) -> None:
    count = 0

    @settings(
        max_examples=CASES,
        deadline=None,
        derandomize=not IS_LONG,
        database=None,
        phases=[Phase.generate] if IS_LONG else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.lists(requests(path, target.checkpoint), min_size=1, max_size=2), st.sampled_from(["fuzz"] * 20 + ["", "x"])
    )
    def send(data: list[bytes], token: str) -> None:
        nonlocal count
        target.send(path, data, token)
        count += 1
        if count % CHECK_EVERY == 0:
            target.check()

    send()
    target.check()


def test_and_nothing_is_left_of_it(target: Target) -> None:
    """Runs last in this file."""
    target.check_end()
    assert target.grown_bytes < MAX_GROWTH
    total = sum(target.outcomes.values())
    assert total >= CASES * len(METHODS) * 0.9
    lines = [f"{count:7,} {outcome}" for outcome, count in sorted(target.outcomes.items())]
    lines.append(f"{total:7,} in all; {target.grown_bytes / 2**20:.0f} MiB more memory")
    lines.append(f"refusals took {_spread([seconds for seconds, _ in target.refusals])}")
    lines.append(f"calls in between that ask for next to nothing took {_spread(target.pings)}")
    lines += [f"  {seconds:.3f} s {outcome}" for seconds, outcome in sorted(target.refusals)[-SLOWEST:]]
    report = "\n".join([*lines, ""])
    if IS_LONG:
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(report)


@pytest.mark.parametrize("kind", ["list", "map"])
def test_values_in_values_in_values_are_refused_before_they_are_walked(target: Target, kind: str) -> None:
    for depth in (20, 45, 90, 5000):
        # By hand: the libraries themselves stop at a hundred levels.
        data = b"\x10\x01"
        for _ in range(depth):
            if kind == "list":
                inner = b"\x0a" + _varint(len(data)) + data
                data = b"\x3a" + _varint(len(inner)) + inner
            else:
                entry = b"\x0a\x01a\x12" + _varint(len(data)) + data
                inner = b"\x0a" + _varint(len(entry)) + entry
                data = b"\x42" + _varint(len(inner)) + inner
        entry = b"\x0a\x06prompt\x12" + _varint(len(data)) + data
        name = VICTIM.encode()
        request = b"\x0a" + _varint(len(name)) + name + b"\x3a" + _varint(len(entry)) + entry
        target.send("/denoised.v1.GenerationService/Generate", [request])
    target.check()


def test_random_edits_of_a_picture_are_refused_or_run(target: Target) -> None:
    rng = random.Random(0)
    for form in ("PNG", "JPEG", "WEBP"):
        buffer = io.BytesIO()
        Image.effect_noise((16, 16), 50).convert("RGB").save(buffer, form)
        for _ in range(500 if IS_LONG else 15):
            data = bytearray(buffer.getvalue())
            for _ in range(rng.randint(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            request = good("/denoised.v1.GenerationService/Generate", target.checkpoint)
            assert isinstance(request, generation_pb.GenerateRequest)
            request.arguments["ip_adapter_image"].artifact_value.media_type = f"image/{form.lower()}"
            request.arguments["ip_adapter_image"].artifact_value.data = bytes(data[: rng.randint(1, len(data))])
            target.send("/denoised.v1.GenerationService/Generate", [request.SerializeToString()])
    target.check()


def _spread(seconds: list[float]) -> str:
    half, most = (statistics.quantiles(seconds, n=100)[percent - 1] for percent in (50, 99))
    late = sum(each > 1 for each in seconds)
    return f"{half:.4f} s (p50), {most:.3f} s (p99), {max(seconds):.3f} s at most; {late} longer than a second"


def _varint(number: int) -> bytes:
    data = b""
    while number > 127:
        data += bytes([number & 127 | 128])
        number >>= 7
    return data + bytes([number])

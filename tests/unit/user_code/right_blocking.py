"""A program of the blocking SDK."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import denoised
from denoised import AutoPipelineForImage2Image, AutoPipelineForText2Image, Client, Pipeline, PipelineOutput

pipe = AutoPipelineForText2Image.from_pretrained("demo", torch_dtype="float16", safety_checker=None, ttl="1h")
assert_type(pipe, Pipeline)
assert_type(AutoPipelineForImage2Image.from_pipe(pipe, strength=1), Pipeline)
assert_type(AutoPipelineForText2Image.from_pretrained(Path("/models/x")), Pipeline)

assert_type(pipe("a cat"), PipelineOutput)
assert_type(
    pipe("a cat", num_inference_steps=3, batching="forbid", priority=1, timeout=1.5, seed=[1, 2]), PipelineOutput
)
assert_type(pipe("a cat", return_dict=True), PipelineOutput)
assert_type(pipe("a cat", return_dict=False, seed=1), tuple[Any, ...])


def either(as_dict: bool) -> PipelineOutput | tuple[Any, ...]:
    return pipe("a cat", return_dict=as_dict)


def at_step_end(pipe: Pipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._guidance_scale = 0.0
    return tensors


result = pipe("a cat", callback_on_step_end=at_step_end, callback_on_step_end_tensor_inputs=["latents"])
assert_type(result.seeds, tuple[int, ...])
assert_type(result.timings.run_seconds, float)
result.images[0].save("a.png")

pipe.scheduler = "EulerDiscreteScheduler"
pipe.scheduler = ("DDIMScheduler", {"timestep_spacing": "trailing"})
pipe.scheduler = denoised.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
pipe.scheduler = None
assert_type(pipe.scheduler.config.beta_start, Any)
pipe("a cat", noise_scheduler="EulerDiscreteScheduler")
pipe.enable_vae_tiling()
pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
assert_type(pipe.config["unet"], Any)
assert_type(pipe.unet.config.sample_size, Any)
assert_type(pipe.to("cuda"), Pipeline)
embeds, negative = pipe.encode_prompt("a cat", timeout=3)
assert_type(pipe.unload(force=True), int)

controlnet = denoised.ControlNetModel.from_pretrained("lllyasviel/sd-controlnet-canny", torch_dtype="float16")
assert_type(controlnet, denoised.Component)
assert_type(denoised.AutoencoderKL.from_pretrained(Path("/models/vae"), subfolder="vae"), denoised.Component)
assert_type(denoised.DDIMScheduler.from_config(pipe.scheduler.config), denoised.Component)
kind: type[denoised.Component] = denoised.FluxControlNetModel
AutoPipelineForText2Image.from_pretrained("demo", controlnet=[controlnet, controlnet], vae=pipe.components["vae"])
AutoPipelineForImage2Image.from_pipe(pipe, controlnet=controlnet)

with Client("gpu-host:50051", timeout=3) as client, client.load("demo", pipeline_id="x") as other:
    assert_type(other.memory.shared_bytes, int)
    for each in client.pipelines():
        assert_type(each, Pipeline)

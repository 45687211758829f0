"""What the blocking SDK does not take."""

from __future__ import annotations

import denoised
from denoised import AutoPipelineForImage2Image, AutoPipelineForText2Image, Client, Pipeline, PipelineOutput, aio

pipe = AutoPipelineForText2Image.from_pretrained("demo")

AutoPipelineForText2Image.from_pretrained(3)  # error: arg-type
AutoPipelineForText2Image.from_pretrained("demo", client="gpu-host")  # error: arg-type
AutoPipelineForImage2Image.from_pipe("pipelines/x")  # error: arg-type
pipe("a cat", batching="sometimes")  # error: call-overload
pipe("a cat", priority="high")  # error: call-overload
pipe("a cat", timeout="1h")  # error: call-overload
pipe("a cat", seed="apple")  # error: arg-type
image = pipe("a cat", return_dict=False).images  # error: attr-defined
result: tuple[object, ...] = pipe("a cat")  # error: assignment
seeds: list[int] = PipelineOutput.seeds  # error: assignment
pipe.enable_freeu("much", 0.2, 1.2, 1.4)  # error: arg-type
pipe.enable_freeu(0.9)  # error: call-arg
pipe.unload(force="yes")  # error: arg-type
pipe.name = "x"  # error: misc
pipe.encode_prompt("a cat", batching="sometimes")  # error: arg-type
Client(50051)  # error: arg-type
Client().load("demo", tsk="inpainting")  # error: call-arg
denoised.ControlNetModel.from_pretrained(3)  # error: arg-type
denoised.ControlNetModel.from_pretrained("x", subfolder=1)  # error: arg-type
denoised.ControlNetModel.from_pretrained("x", use_safetensors="yes")  # error: arg-type
denoised.ControlNetModel("x", name="canny")  # error: call-arg
denoised.ControlNetModel.from_pretrained("x").parameters()  # error: attr-defined
net: denoised.ControlNetModel = None  # error: valid-type


async def awaited(other: aio.AsyncPipeline) -> None:
    await pipe("a cat")  # error: attr-defined
    AutoPipelineForImage2Image.from_pipe(other)  # error: arg-type
    here: Pipeline = other  # error: assignment

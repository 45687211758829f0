"""What the asyncio SDK does not take."""

from __future__ import annotations

from denoised import Pipeline, aio


async def main(blocking: Pipeline) -> None:
    pipe = await aio.AutoPipelineForText2Image.from_pretrained("demo")
    aio.AutoPipelineForText2Image.from_pretrained("demo").name  # error: attr-defined
    pipe("a cat").images  # error: attr-defined
    (await pipe("a cat", return_dict=False)).images  # error: attr-defined
    await pipe("a cat", batching="sometimes")  # error: call-overload
    await pipe("a cat", quality="best")  # error: call-overload
    pipe.scheduler = "EulerDiscreteScheduler"  # error: assignment, misc
    pipe.encode_prompt("a cat")[0]  # error: index
    await aio.AutoPipelineForInpainting.from_pipe(blocking)  # error: arg-type
    with pipe:  # error: attr-defined
        pass
    with aio.AsyncClient() as client:  # error: attr-defined
        pass
    aio.AsyncClient().load("demo").unload()  # error: attr-defined

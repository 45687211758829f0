"""A program of the asyncio SDK."""

from __future__ import annotations

import asyncio
from typing import Any, assert_type

import denoised
from denoised import PipelineOutput, aio


async def at_step_end(pipe: aio.AsyncPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    await asyncio.sleep(0)
    return tensors


async def main(as_dict: bool) -> None:
    async with aio.AsyncClient("gpu-host:50051") as client:
        pipe = await aio.AutoPipelineForText2Image.from_pretrained("demo", client=client)
        assert_type(pipe, aio.AsyncPipeline)
        assert_type(await aio.AutoPipelineForInpainting.from_pipe(pipe), aio.AsyncPipeline)
        assert_type(await pipe("a cat", batching="forbid"), PipelineOutput)
        assert_type(await pipe("a cat", return_dict=False, priority=3), tuple[Any, ...])
        assert_type(await pipe("a cat", return_dict=as_dict), PipelineOutput | tuple[Any, ...])
        await pipe("a cat", callback_on_step_end=at_step_end)
        await pipe.set_scheduler(denoised.DDIMScheduler.from_config(pipe.scheduler.config))
        await pipe.enable_vae_slicing()
        embeds, negative = await pipe.encode_prompt("a cat")
        results = await asyncio.gather(pipe("a cat"), pipe("a dog"))
        assert_type([result.seeds for result in results], list[tuple[int, ...]])
        async with pipe as same:
            assert_type(await same.refresh(), aio.AsyncPipeline)

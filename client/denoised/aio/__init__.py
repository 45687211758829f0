"""The SDK for asyncio: the same classes, with coroutines where they call the daemon.

async with denoised.aio.AsyncClient("gpu-host:50051") as client:
    pipe = await denoised.aio.AutoPipelineForText2Image.from_pretrained("demo", client=client)
    image = (await pipe("a red apple")).images[0]
"""

from .auto_pipeline import (
    AutoPipelineForImage2Image,
    AutoPipelineForImage2Video,
    AutoPipelineForInpainting,
    AutoPipelineForText2Audio,
    AutoPipelineForText2Image,
    AutoPipelineForText2Video,
    AutoPipelineForVideo2Video,
)
from .client import AsyncClient, default_client
from .fleet import AsyncFleet, AsyncFleetPipeline
from .generation_stream import AsyncGenerationStream
from .job import AsyncJob
from .pipeline import AsyncPipeline
from .stream import AsyncStream

__all__ = [
    "AsyncClient",
    "AsyncFleet",
    "AsyncFleetPipeline",
    "AsyncGenerationStream",
    "AsyncJob",
    "AsyncPipeline",
    "AsyncStream",
    "AutoPipelineForImage2Image",
    "AutoPipelineForImage2Video",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Audio",
    "AutoPipelineForText2Image",
    "AutoPipelineForText2Video",
    "AutoPipelineForVideo2Video",
    "default_client",
]

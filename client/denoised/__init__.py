"""Remote diffusers pipelines that feel like local ones.

    from denoised import AutoPipelineForText2Image

    pipe = AutoPipelineForText2Image.from_pretrained("demo")
    image = pipe("a red apple", num_inference_steps=25).images[0]

A daemon holds the pipelines: start one with `denoised serve`, and name one elsewhere with DENOISED_TARGET or
`Client("gpu-host:50051")`. `denoised.ControlNetModel`, and so every class of diffusers and transformers, names a
component for the daemon to load. `denoised.aio` is the same for asyncio; `denoised.errors` has all that can go wrong.
"""

from . import errors
from .adapter import Adapter
from .auto_pipeline import (
    AutoPipelineForImage2Image,
    AutoPipelineForImage2Video,
    AutoPipelineForInpainting,
    AutoPipelineForText2Audio,
    AutoPipelineForText2Image,
    AutoPipelineForText2Video,
    AutoPipelineForVideo2Video,
)
from .client import Client, default_client
from .component import Component
from .component import reference_class_of as _reference_class_of
from .description import LiveComponent, Memory
from .errors import (
    DaemonUnreachableError,
    DeadlineExceededError,
    DenoisedError,
    InvalidRequestError,
    LoadError,
    PipelineNotFoundError,
    ResourceError,
    TaskNotSupportedError,
    UnavailableError,
)
from .fleet import Fleet, FleetPipeline
from .generation_stream import GenerationStream
from .job import Job
from .manifest import Manifest
from .pipeline import Pipeline
from .plan import Plan, PlannedComponent, PlannedEviction
from .preview import Preview
from .result import PipelineOutput, Timings
from .stream import Stream
from .version import __version__

__all__ = [
    "Adapter",
    "AutoPipelineForImage2Image",
    "AutoPipelineForImage2Video",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Audio",
    "AutoPipelineForText2Image",
    "AutoPipelineForText2Video",
    "AutoPipelineForVideo2Video",
    "Client",
    "Component",
    "DaemonUnreachableError",
    "DeadlineExceededError",
    "DenoisedError",
    "Fleet",
    "FleetPipeline",
    "GenerationStream",
    "InvalidRequestError",
    "Job",
    "LiveComponent",
    "LoadError",
    "Manifest",
    "Memory",
    "Pipeline",
    "PipelineNotFoundError",
    "PipelineOutput",
    "Plan",
    "PlannedComponent",
    "PlannedEviction",
    "Preview",
    "ResourceError",
    "Stream",
    "TaskNotSupportedError",
    "Timings",
    "UnavailableError",
    "__version__",
    "default_client",
    "errors",
]


def __getattr__(name: str) -> type[Component]:
    """Classes of diffusers and transformers, such as `ControlNetModel`: references to components of theirs."""
    return _reference_class_of(__name__, name, __all__)

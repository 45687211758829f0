"""Pipelines by task, as diffusers' AutoPipeline has them."""
# Generated from aio/auto_pipeline.py by client/unasync.py: edit that one.

from __future__ import annotations

import os
from typing import Any, ClassVar

from . import parameters, spec
from .client import Client, default_client
from .component import Component
from .errors import UnsupportedError
from .pipeline import Pipeline
from .progress import LoadingBar


class _AutoPipeline:
    config_name: ClassVar[str] = "model_index.json"
    _task: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(
            f"{name} is designed to be instantiated "
            f"using the `{name}.from_pretrained(pretrained_model_name_or_path)` or "
            f"`{name}.from_pipe(pipeline)` methods."
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_or_path: str | os.PathLike[str], *, client: Client | None = None, **kwargs: Any
    ) -> Pipeline:
        """Loads a checkpoint for this task in the daemon.

        Args:
            pretrained_model_or_path: Repository on the Hub ("owner/name"), directory that the daemon may read, or
                embedded model such as "demo".
            client: The daemon to use. Defaults to the one that DENOISED_TARGET names.
            **kwargs: `torch_dtype` or `dtype` (a torch.dtype or its name, "auto" for that of the files, or a dict by
                component; float32 by default), `variant`, `revision`, `subfolder`, `use_safetensors`,
                `quantization_config`, `token` (of the Hub, for this load only), `local_files_only`, `force_download`;
                `ttl` (how long it stays after its last use: seconds or "1h"), `pipeline_id`, `request_id`, `shared`,
                `pinned`, `keep_alive` (how long its weights stay on the device after its last use), `timeout`; and
                replacements of components and constructor options by name, such as `safety_checker=None`,
                `requires_safety_checker=False`, `controlnet=denoised.ControlNetModel.from_pretrained(…)`,
                `vae=other_pipe.components["vae"]`, or a noise scheduler of diffusers. Naming `controlnet` selects the
                ControlNet class, as in diffusers.

        Returns:
            The pipeline, ready to run.

        Raises:
            InvalidFieldError: An argument is unknown or cannot work with a daemon.
            LoadError: The source does not exist, may not be read, or is not whole.
            TaskNotSupportedError: The checkpoint's family has no class for this task.
            ResourceError: The weights do not fit.
        """
        settings, replaced = parameters.split_load_arguments(kwargs)
        client = client or default_client()
        with LoadingBar({} if client.progress_bar else {"disable": True}) as bar:
            return client.load(
                pretrained_model_or_path, task=cls._task, overrides=replaced, on_progress=bar, **settings
            )

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | Component | None = None,
        client: Client | None = None,
        **kwargs: Any,
    ) -> Pipeline:
        """Loads a checkpoint whose weights are in one safetensors file, in the layout of those who trained it.

        diffusers has this for single classes; here the class comes from the configuration and the task.

        Args:
            pretrained_model_link_or_path: A file that the daemon may read, a link to one on the Hub, or
                "owner/name/file.safetensors".
            config: Repository on the Hub or directory with the model_index.json, configurations and tokenizers, or a
                `Component` with its subfolder and revision. Defaults to where the file is.
            client: As for `from_pretrained`.
            **kwargs: As for `from_pretrained`, but for `quantization_config`.

        Returns:
            The pipeline, ready to run.

        Raises:
            InvalidFieldError: An argument is unknown or cannot work with a daemon.
            LoadError: The file or its configuration does not exist, may not be read, or is not whole.
            TaskNotSupportedError: The family has no class for this task, or diffusers reads no single files as it.
            ResourceError: The weights do not fit.
        """
        settings, replaced = parameters.split_load_arguments(kwargs)
        repo_id, file, revision = spec.single_file(pretrained_model_link_or_path)
        settings = {"revision": revision, **settings}
        client = client or default_client()
        with LoadingBar({} if client.progress_bar else {"disable": True}) as bar:
            return client.load(
                repo_id,
                task=cls._task,
                single_file=file,
                config=config,
                overrides=replaced,
                on_progress=bar,
                **settings,
            )

    @classmethod
    def from_pipe(cls, pipeline: Pipeline, **kwargs: Any) -> Pipeline:
        """Makes a pipeline for this task from the components of another one, without new memory in the daemon but for
        components that are given.

        Its noise scheduler is its own, where in diffusers both pipelines share one.

        Args:
            pipeline: A pipeline of this package. Either may be unloaded first.
            **kwargs: `token`, `local_files_only`, `force_download`, `ttl`, `pipeline_id`, `request_id`, `shared`,
                `pinned`, `keep_alive`, `timeout`, and replacements as in `from_pretrained`.
                `controlnet=None` removes a ControlNet.

        Returns:
            The new pipeline.

        Raises:
            InvalidFieldError: An argument is unknown or cannot work with a daemon.
            PipelineNotFoundError: The pipeline is gone.
            TaskNotSupportedError: Its family has no class for this task.
        """
        if not isinstance(pipeline, Pipeline):
            raise UnsupportedError(
                f"from_pipe: a {type(pipeline).__module__}.{type(pipeline).__name__} does not live in a daemon.",
                hint=f"Give what {cls.__module__}.{cls.__name__}.from_pretrained returned.",
            )
        settings, replaced = parameters.split_derive_arguments(kwargs)
        return pipeline.client.derive(pipeline, cls._task, overrides=replaced, **settings)


class AutoPipelineForText2Image(_AutoPipeline):
    """Text-to-image pipelines.

    Example:
        pipe = AutoPipelineForText2Image.from_pretrained("demo")
        result = pipe("a red apple")
        result.images[0].save("picture.png")
    """

    _task = "text-to-image"


class AutoPipelineForImage2Image(_AutoPipeline):
    """Image-to-image pipelines.

    Example:
        pipe = AutoPipelineForImage2Image.from_pipe(pipe_t2i)
        result = pipe("a tangerine", image=picture, strength=0.6)
        result.images[0].save("picture.png")
    """

    _task = "image-to-image"


class AutoPipelineForInpainting(_AutoPipeline):
    """Inpainting pipelines.

    Example:
        pipe = AutoPipelineForInpainting.from_pipe(pipe_t2i)
        result = pipe("a leaf", image=picture, mask_image=mask)
        result.images[0].save("picture.png")
    """

    _task = "inpainting"


class AutoPipelineForText2Audio(_AutoPipeline):
    """Text-to-audio pipelines.

    Example:
        pipe = AutoPipelineForText2Audio.from_pretrained("owner/name")
        result = pipe("rain on a tin roof", media_type="audio/wav")
        result.audios[0].save("rain.wav")
    """

    _task = "text-to-audio"


class AutoPipelineForText2Video(_AutoPipeline):
    """Text-to-video pipelines, for which diffusers has a mapping and no Auto class.

    Example:
        pipe = AutoPipelineForText2Video.from_pretrained("owner/name")
        result = pipe("a boat in a storm", media_type="video/mp4")
        result.frames[0].save("boat.mp4")
    """

    _task = "text-to-video"


class AutoPipelineForImage2Video(_AutoPipeline):
    """Image-to-video pipelines, for which diffusers has a mapping and no Auto class.

    Example:
        pipe = AutoPipelineForImage2Video.from_pipe(pipe_t2v)
        result = pipe("it begins to rain", image=picture, output_type="pil")
        result.frames[0][-1].save("last.png")
    """

    _task = "image-to-video"


class AutoPipelineForVideo2Video(_AutoPipeline):
    """Video-to-video pipelines, for which diffusers has a mapping and no Auto class.

    Example:
        pipe = AutoPipelineForVideo2Video.from_pipe(pipe_t2v)
        result = pipe("the same at night", video=frames, strength=0.7)
    """

    _task = "video-to-video"

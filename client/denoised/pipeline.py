"""A pipeline that lives in a daemon."""
# Generated from aio/pipeline.py by client/unasync.py: edit that one.

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from . import adapter, description
from .adapter import Adapters
from .call import Call
from .description import LiveComponent, Memory
from .errors import DenoisedError
from .pipeline_adapters import PipelineAdapters
from .progress import DenoisingBar
from .result import PipelineOutput
from .units import Ttl
from .v1 import adapter_pb2, pipeline_service_pb2

if TYPE_CHECKING:
    from .client import Client


class Pipeline(PipelineAdapters):
    """A handle to a live diffusers pipeline; call it as you would call the pipeline.

    Get one from an Auto class or a client, never from here. `with pipe:` unloads it at the end.

    Example:
        result = pipe("a red apple", num_inference_steps=25)
        result.images[0].save("apple.png")

    `components` and `memory` ask the daemon; other attributes are as of its last answer, see `refresh`.
    """

    __slots__ = ("__weakref__", "_bar_config", "_client", "_device", "_info")

    _bar_config: dict[str, Any]
    _client: Client
    _device: str
    _info: pipeline_service_pb2.Pipeline

    def __init__(self, client: Client, info: pipeline_service_pb2.Pipeline, device: str) -> None:
        self._client = client
        self._info = info
        self._device = device
        self._bar_config = {}

    @overload
    def __call__(
        self,
        *args: Any,
        batching: Literal["allow", "forbid"] = ...,
        priority: int = ...,
        timeout: float | None = ...,
        seed: int | Sequence[int] | None = ...,
        media_type: str = ...,
        quality: int | None = ...,
        adapters: Adapters | None = ...,
        return_dict: Literal[True] = ...,
        **kwargs: Any,
    ) -> PipelineOutput: ...

    @overload
    def __call__(self, *args: Any, return_dict: Literal[False], **kwargs: Any) -> tuple[Any, ...]: ...

    def __call__(
        self,
        *args: Any,
        batching: str = "allow",
        priority: int = 0,
        timeout: float | None = None,
        seed: int | Sequence[int] | None = None,
        media_type: str = "",
        quality: int | None = None,
        adapters: Adapters | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the pipeline.

        All arguments of the pipeline's own `__call__` are taken, by position or by name: `prompt`, `image`,
        `num_inference_steps`, `guidance_scale`, `generator`, `output_type`, …; `parameters` lists them. What is left
        out keeps the pipeline's default, None is sent as None. A torch.Generator is used from its present state and
        left as diffusers would leave it. `callback_on_step_end(pipe, step, timestep, tensors)` is told of each step,
        with None for the timestep and no tensors; what it raises stops the generation.

        Args:
            *args: Arguments by position, `prompt` first with nearly every pipeline.
            batching: "allow" lets its calls join those of other generations, which changes the result by rounding
                only. "forbid" gives the bits that diffusers gives alone in a process.
            priority: Order among waiting generations, higher first, from -100 to 100.
            timeout: Seconds it may take, waiting included.
            seed: Starts the random generators, instead of `generator`: one seed, or one per image, from 0 to 2**64 - 1.
                When neither is given the daemon draws one; the result has it.
            media_type: How PIL images travel: "image/png", "image/jpeg", "image/webp" or "application/x-ndarray" (raw
                pixels). Defaults to what is fastest without loss.
            quality: Quality of JPEG and WebP, from 1 to 100. Defaults to 90.
            adapters: LoRAs for this call in place of those of the pipeline: `denoised.Adapter`s, names of loaded ones,
                or names with their scales. An empty list switches the pipeline's off.
            **kwargs: Arguments by name.

        Returns:
            The fields of diffusers' output class with `seeds` and `timings`, or their tuple for `return_dict=False`.

        Raises:
            InvalidRequestError: An argument is unknown, of the wrong type or out of range, or diffusers refused it.
            PipelineNotFoundError: The pipeline is gone.
            ResourceError: The queue is full or memory ran out.
            DeadlineExceededError: It took longer than `timeout`.
            UnavailableError: The daemon or its worker went away.
        """
        call = Call(
            self.name,
            [parameter.name for parameter in self._info.parameters],
            args,
            kwargs,
            batching=batching,
            priority=priority,
            seed=seed,
            media_type=media_type,
            quality=quality,
            adapters=adapters,
            loaded_adapters=[loaded.name for loaded in self._info.adapters],
            target=self._client.target,
        )
        config = self._bar_config if self._client.progress_bar else {**self._bar_config, "disable": True}
        stream = self._client.generate(call.request, timeout=timeout)
        bar = DenoisingBar(config)
        try:
            with contextlib.closing(iter(stream)) as events:
                for event in events:
                    call.receive(event, self, bar)
        finally:
            bar.close()
        return call.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.unload()
            return
        # What went wrong inside says more than what may go wrong with the clean-up.
        with contextlib.suppress(DenoisedError):
            self.unload()

    @property
    def name(self) -> str:
        """The handle, "pipelines/{id}"."""
        return self._info.name

    @property
    def client(self) -> Client:
        """The connection it uses."""
        return self._client

    @property
    def info(self) -> pipeline_service_pb2.Pipeline:
        """Everything that the daemon last said about it."""
        return self._info

    @property
    def task(self) -> str:
        """ "text-to-image", "image-to-image", "inpainting", or empty for classes of other tasks."""
        return description.task_name(self._info)

    @property
    def parameters(self) -> list[pipeline_service_pb2.Parameter]:
        """What its `__call__` takes, in order."""
        return list(self._info.parameters)

    @property
    def components(self) -> dict[str, LiveComponent]:
        """Its parts by role, with content digest, size and how many pipelines share each; others can be given them."""
        return description.describe_components(self.refresh()._info)

    @property
    def memory(self) -> Memory:
        """Bytes of its weights: its own, and those it shares."""
        return description.describe_memory(self.refresh()._info)

    @property
    def device(self) -> Any:
        """The device its worker owns: a torch.device where torch is in use, else its name."""
        return description.torch_device(self._device)

    @property
    def dtype(self) -> Any:
        """Element type of its weights: a torch.dtype where torch is in use, else its name."""
        return description.torch_dtype(self._info)

    def refresh(self) -> Self:
        """Asks the daemon how it is. Raises PipelineNotFoundError when it is gone."""
        self._info = self._client.get_info(self.name)
        return self

    def renew(self, ttl: Ttl | None = None) -> Self:
        """Sets its lease anew: `ttl` seconds, a timedelta or text such as "1h" after its last use.

        Defaults to what it was. Raises PipelineNotFoundError when it is gone.
        """
        self._info = self._client.renew(self.name, ttl)
        return self

    def unload(self, *, force: bool = False) -> int:
        """Lets go of it, and returns the bytes of weights that no other pipeline needs.

        Its running generations are finished first, or stopped with `force`.
        """
        return self._client.unload(self.name, force=force)

    def _adapt(self, method: str, sources: Sequence[adapter_pb2.AdapterSource] = (), **arguments: Any) -> None:
        calls = [*self._info.settings.adapters, adapter.call_message(method, sources, arguments)]
        settings = pipeline_service_pb2.PipelineSettings(adapters=calls)
        self._info = self._client.update(self.name, settings, ["adapters"])

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Returns itself, for programs written for diffusers: the daemon decides where the weights are.

        Warns when that is not what was asked for.
        """
        asked = (*args, *(kwargs[name] for name in ("device", "dtype") if name in kwargs))
        for difference in description.moves(asked, self._info, self._device):
            warnings.warn(f"{self.name} stays as it is ({difference}).", stacklevel=2)
        return self

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Arguments for the tqdm bars of its generations, such as `disable=True`, `desc="apples"`, `leave=False`."""
        self._bar_config = kwargs

    def __getattr__(self, name: str) -> Any:
        known = ", ".join(sorted(known for known in dir(type(self)) if not known.startswith("_")))
        raise AttributeError(f"A remote pipeline has no {name!r}. There is: {known}.", name=name, obj=self)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self.__slots__:
            raise AttributeError(
                f"{name!r} of a remote pipeline cannot be set. Name what to replace in from_pretrained or from_pipe.",
                name=name,
                obj=self,
            )
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return description.as_text(self._info, self._client.target)

    def _repr_html_(self) -> str:
        return description.as_html(self._info, self._client.target)

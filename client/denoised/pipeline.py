"""A pipeline that lives in a daemon."""
# Generated from aio/pipeline.py by client/unasync.py: edit that one.

from __future__ import annotations

import contextlib
import uuid
import warnings
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from . import adapter, arguments, description, media
from .adapter import Adapters
from .call import Call
from .callbacks import unawaited
from .config import FrozenDict, of_pipeline
from .description import LiveComponent, Memory
from .errors import DenoisedError, GenerationInterruptedError, UnsupportedError
from .job import Job
from .noise_scheduler import NoiseSchedulerLike
from .pipeline_adapters import PipelineAdapters
from .pipeline_settings import PipelineSettings
from .preview import OnPreview, Previews
from .progress import DenoisingBar, bar_over
from .result import PipelineOutput
from .units import Ttl, to_duration
from .v1 import adapter_pb2, generation_service_pb2, pipeline_service_pb2
from .values import from_proto

if TYPE_CHECKING:
    from .client import Client


class Pipeline(PipelineAdapters, PipelineSettings):
    """A handle to a live diffusers pipeline; call it as you would call the pipeline.

    Get one from an Auto class or a client, never from here. `with pipe:` unloads it at the end. Its class has the
    name of the remote pipeline's class, and its components are attributes: `pipe.unet`, `pipe.vae`.

    Example:
        result = pipe("a red apple", num_inference_steps=25)
        result.images[0].save("apple.png")

    `components` and `memory` ask the daemon; other attributes are as of its last answer, see `refresh`.
    """

    __slots__ = ("__weakref__", "_bar_config", "_client", "_device", "_info", "_interrupt", "_state", "_warned")

    _bar_config: dict[str, Any]
    _client: Client
    _device: str
    _info: pipeline_service_pb2.Pipeline
    _interrupt: bool
    _state: dict[str, Any]
    _warned: set[str]

    def __new__(cls, client: Client, info: pipeline_service_pb2.Pipeline, device: str) -> Self:
        # Programs look at the name of a pipeline's class.
        base: Any = cls
        pipeline: Self = object.__new__(description.named_class(base, info.pipeline_class))
        return pipeline

    def __init__(self, client: Client, info: pipeline_service_pb2.Pipeline, device: str) -> None:
        self._client = client
        self._info = info
        self._device = device
        self._bar_config = {}
        self._interrupt = False
        self._state = {}
        self._warned = set()

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
        frames_per_second: float | None = ...,
        adapters: Adapters | None = ...,
        noise_scheduler: NoiseSchedulerLike | None = ...,
        preview: int | None = ...,
        on_preview: OnPreview | None = ...,
        preview_size: int = ...,
        embed_manifest: bool = ...,
        return_dict: Literal[True] = ...,
        **kwargs: Any,
    ) -> PipelineOutput: ...

    @overload
    def __call__(
        self,
        *args: Any,
        return_dict: Literal[False],
        batching: Literal["allow", "forbid"] = ...,
        priority: int = ...,
        timeout: float | None = ...,
        seed: int | Sequence[int] | None = ...,
        media_type: str = ...,
        quality: int | None = ...,
        adapters: Adapters | None = ...,
        noise_scheduler: NoiseSchedulerLike | None = ...,
        preview: int | None = ...,
        on_preview: OnPreview | None = ...,
        preview_size: int = ...,
        **kwargs: Any,
    ) -> tuple[Any, ...]: ...

    @overload
    def __call__(
        self,
        *args: Any,
        return_dict: bool,
        batching: Literal["allow", "forbid"] = ...,
        priority: int = ...,
        timeout: float | None = ...,
        seed: int | Sequence[int] | None = ...,
        media_type: str = ...,
        quality: int | None = ...,
        adapters: Adapters | None = ...,
        noise_scheduler: NoiseSchedulerLike | None = ...,
        preview: int | None = ...,
        on_preview: OnPreview | None = ...,
        preview_size: int = ...,
        **kwargs: Any,
    ) -> PipelineOutput | tuple[Any, ...]: ...

    def __call__(
        self,
        *args: Any,
        batching: str = "allow",
        priority: int = 0,
        timeout: float | None = None,
        seed: int | Sequence[int] | None = None,
        media_type: str = "",
        quality: int | None = None,
        frames_per_second: float | None = None,
        adapters: Adapters | None = None,
        noise_scheduler: NoiseSchedulerLike | None = None,
        preview: int | None = None,
        on_preview: OnPreview | None = None,
        preview_size: int = 256,
        embed_manifest: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Runs the pipeline.

        All arguments of the pipeline's own `__call__` are taken, by position or by name: `prompt`, `image`,
        `num_inference_steps`, `guidance_scale`, `generator`, `output_type`, …; `parameters` lists them. What is left
        out keeps the pipeline's default, None is sent as None. A torch.Generator is used from its present state and
        left as diffusers would leave it. Images may be PIL images, arrays, tensors, files of this machine, or lists.

        `callback_on_step_end(pipe, step, timestep, tensors)` is called here at each step, with the tensors that
        `callback_on_step_end_tensor_inputs` names ("latents" by default). Tensors that it changes or returns have
        effect in the daemon, as has what it sets on `pipe`: `pipe._guidance_scale = 0.0`, `pipe._interrupt = True`. The
        generation waits for it and others go on; what it raises stops the generation. With
        `callback_on_step_end_tensor_inputs=[]` it is only told of steps, with None for the timestep, and nothing waits.

        Args:
            *args: Arguments by position, `prompt` first with nearly every pipeline.
            batching: "allow" lets its calls join those of other generations, which changes the result by rounding
                only. "forbid" gives the bits that diffusers gives alone in a process.
            priority: Order among waiting generations, higher first, from -100 to 100.
            timeout: Seconds it may take, waiting included. One that the daemon sees it cannot keep is refused at once.
            seed: Starts the random generators, instead of `generator`: one seed, or one per image, from 0 to 2**64 - 1.
                When neither is given the daemon draws one; the result has it.
            media_type: How PIL images travel: "image/png", "image/jpeg", "image/webp" or "application/x-ndarray" (raw
                pixels); or "audio/wav" and "video/mp4" for files of sounds and videos. Defaults to what is fastest
                without loss.
            quality: Quality of JPEG and WebP, from 1 to 100. Defaults to 90.
            frames_per_second: Of "video/mp4". Defaults to the pipeline's `frame_rate` or `fps`, or to 16.
            adapters: LoRAs for this call in place of those of the pipeline: `denoised.Adapter`s, names of loaded ones,
                or names with their scales. An empty list switches the pipeline's off.
            noise_scheduler: For this call alone, as for `set_scheduler`. Defaults to the pipeline's.
            preview: A picture of what is being made after every so many steps: for `on_preview`, else shown live in a
                notebook. A pipeline learns how to make them from the first images that it decodes.
            on_preview: Called with each `denoised.Preview`: a PIL image, and steps done. One that is slow gets fewer.
            preview_size: Length of a preview's longer side, from 16 to 1024 pixels.
            embed_manifest: Whether images of output type "pil" are saved with how they were made: as PNG, JPEG or
                WebP, for `denoised reproduce`.
            **kwargs: Arguments by name.

        Returns:
            The fields of diffusers' output class with `seeds` and `timings`, or their tuple for `return_dict=False`.

        Raises:
            InvalidRequestError: An argument is unknown, of the wrong type or out of range, or diffusers refused it.
            PipelineNotFoundError: The pipeline is gone.
            ResourceError: The queue is full or memory ran out.
            DeadlineExceededError: It took longer than `timeout`, or would have.
            UnavailableError: The daemon or its worker went away.
        """
        previews = Previews(preview, on_preview, preview_size)
        config = self._bar_config if self._client.progress_bar else {**self._bar_config, "disable": True}
        call = Call(
            self.name,
            self._info.parameters,
            args,
            kwargs,
            batching=batching,
            priority=priority,
            seed=seed,
            media_type=media_type,
            quality=quality,
            frames_per_second=frames_per_second,
            adapters=adapters,
            embed_manifest=embed_manifest,
            loaded_adapters=[loaded.name for loaded in self._info.adapters],
            noise_scheduler=noise_scheduler,
            target=self._client.target,
            previews=previews,
            has_bar=not config.get("disable"),
        )
        self._interrupt = False
        bar = DenoisingBar(config)
        try:
            if call.callbacks.asked:
                self._converse(call, timeout, bar)
            else:
                with contextlib.closing(iter(self._client.generate(call.request, timeout=timeout))) as events:
                    for event in events:
                        call.receive(event, self, bar)
                        if self._interrupt:
                            raise GenerationInterruptedError("The generation was stopped before its last step.")
        finally:
            bar.close()
            previews.close()
        return call.result()

    def submit(
        self,
        *args: Any,
        batching: str = "allow",
        priority: int = 0,
        seed: int | Sequence[int] | None = None,
        media_type: str = "",
        quality: int | None = None,
        frames_per_second: float | None = None,
        adapters: Adapters | None = None,
        noise_scheduler: NoiseSchedulerLike | None = None,
        timeout: float | None = None,
        request_id: str = "",
        **kwargs: Any,
    ) -> Job:
        """Starts a generation that goes on without this program, and returns as soon as the daemon has accepted it.

        It survives lost connections, the end of this program and a crash of the daemon. The daemon keeps its result for
        a time, by default a day.

        Args:
            *args: As for calling the pipeline, but for callbacks, `generator` and `return_dict`.
            batching: As for calling.
            priority: As for calling.
            seed: As for calling.
            media_type: As for calling.
            quality: As for calling.
            frames_per_second: As for calling.
            adapters: As for calling.
            noise_scheduler: As for calling.
            timeout: Seconds it may take, waiting included. Defaults to no limit.
            request_id: Makes submitting again safe: the same one, with the same request, is the same generation.
                Defaults to a fresh one.
            **kwargs: As for calling.

        Raises:
            UnsupportedError: A callback cannot be called where nobody waits.
            DenoisedError: As calling, until it is accepted.
        """
        call = Call(
            self.name,
            self._info.parameters,
            args,
            kwargs,
            batching=batching,
            priority=priority,
            seed=seed,
            media_type=media_type,
            quality=quality,
            frames_per_second=frames_per_second,
            adapters=adapters,
            loaded_adapters=[loaded.name for loaded in self._info.adapters],
            noise_scheduler=noise_scheduler,
            # That is written into images here; what a job makes has its manifest beside them.
            embed_manifest=False,
            target=self._client.target,
        )
        if call.callbacks.asked or call.callbacks.told is not None:
            raise UnsupportedError("A detached generation calls nobody back.", hint="Leave the callbacks out.")
        request = call.request
        request.on_disconnect = generation_service_pb2.ON_DISCONNECT_DETACH
        request.request_id = request_id or str(uuid.uuid4())
        if timeout is not None:
            request.timeout.CopyFrom(to_duration(timeout, "timeout"))
        name = ""
        with contextlib.closing(iter(self._client.generate(request))) as events:
            for event in events:
                name = event.started.name
                break
        return self._client.generation(name)

    def _converse(self, call: Call, timeout: float | None, bar: DenoisingBar) -> None:
        conversation = self._client.converse(call.start, timeout=timeout)
        with contextlib.closing(iter(conversation)) as events:
            for event in events:
                if not event.HasField("step_end"):
                    call.receive(event.generate, self, bar)
                    continue
                step = call.callbacks.at(event.step_end)
                # As the remote pipeline is in this generation: another one of this handle may run beside it.
                seen = self._seen_by(step.state)
                returned = unawaited(step.run(seen))
                conversation.send(step.reply(returned, interrupt=seen._interrupt or self._interrupt))
                # As in diffusers, where what a call has set stays on the pipeline.
                self._state = step.state

    def _seen_by(self, state: dict[str, Any]) -> Self:
        """The pipeline as a callback sees it: with attributes of the one that runs, which it may set."""
        seen = object.__new__(type(self))
        for name in Pipeline.__slots__[1:]:
            object.__setattr__(seen, name, getattr(self, name))
        object.__setattr__(seen, "_state", state)
        return seen

    def encode_prompt(
        self,
        *args: Any,
        batching: Literal["allow", "forbid"] = "allow",
        priority: int = 0,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the family's own `encode_prompt` in the daemon, and returns what it returns, embeddings as tensors.

        Args:
            *args: Its arguments by position, in the family's own order; the device is taken and left to the daemon.
            batching: As for a call.
            priority: As for a call.
            timeout: Seconds it may take, waiting included.
            **kwargs: Its arguments by name.

        Raises:
            InvalidRequestError: An argument is unknown or of the wrong type, or diffusers refused it.
        """
        parameters = [parameter.name for parameter in self._info.encode_prompt_parameters]
        if not parameters:
            raise AttributeError(
                f"A {self._info.pipeline_class} has no 'encode_prompt'.", name="encode_prompt", obj=self
            )
        named = arguments.by_name(parameters, args, kwargs)
        named.pop("device", None)
        if named.get("dtype") is not None:
            named["dtype"] = str(named["dtype"]).removeprefix("torch.")
        request = generation_service_pb2.EncodePromptRequest(
            pipeline=self.name,
            batching=arguments.batching_number(batching),
            priority=arguments.priority_number(priority),
        )
        arguments.add_values(request, named)
        response = self._client.encode_prompt(request, timeout=timeout)
        values = tuple(media.unpack(from_proto(value)) for value in response.values)
        return values if response.is_tuple else values[0]

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
        """ "text-to-image", "image-to-image", "text-to-audio", …, or empty for classes of other tasks."""
        return description.task_name(self._info)

    @property
    def parameters(self) -> list[pipeline_service_pb2.Parameter]:
        """What its `__call__` takes, in order."""
        return list(self._info.parameters)

    @property
    def _callback_tensor_inputs(self) -> list[str]:
        """What `callback_on_step_end_tensor_inputs` may name; programs for diffusers look here."""
        return list(self._info.callback_tensor_inputs)

    @property
    def components(self) -> dict[str, LiveComponent]:
        """Its parts by role, with content digest, size and how many pipelines share each; others can be given them."""
        return description.describe_components(self.refresh()._info, self._feature)

    @property
    def config(self) -> FrozenDict:
        """Its configuration: class, library and class of each component, and options."""
        return of_pipeline(self._info)

    @property
    def name_or_path(self) -> str:
        """What it was loaded from."""
        return self._info.spec.repo_id

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

    def renew(self, ttl: Ttl | None = None, *, pinned: bool | None = None, keep_alive: Ttl | None = None) -> Self:
        """Sets its lease anew: `ttl` seconds, a timedelta or text such as "1h" after its last use.

        Defaults to what it was. Raises PipelineNotFoundError when it is gone.
        """
        self._info = self._client.renew(self.name, ttl, pinned=pinned, keep_alive=keep_alive)
        return self

    def unload(self, *, force: bool = False) -> int:
        """Lets go of it, and returns the bytes of weights that no other pipeline needs.

        Its running generations are finished first, or stopped with `force`.
        """
        return self._client.unload(self.name, force=force)

    def _adapt(self, method: str, sources: Sequence[adapter_pb2.AdapterSource] = (), **arguments: Any) -> None:
        calls = [*self._info.settings.adapters, adapter.call_message(method, sources, arguments)]
        self._update(pipeline_service_pb2.PipelineSettings(adapters=calls), "adapters")

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Returns itself, for programs written for diffusers: the daemon decides where the weights are.

        Warns, once, when that is not what was asked for.
        """
        asked = (*args, *(kwargs[name] for name in ("device", "dtype") if name in kwargs))
        for difference in description.moves(asked, self._info, self._device):
            kind = difference.partition(":")[0]
            if kind not in self._warned:
                self._warned.add(kind)
                warnings.warn(f"{self.name} stays as it is ({difference}).", stacklevel=2)
        return self

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Arguments for the tqdm bars of its generations, such as `disable=True`, `desc="apples"`, `leave=False`."""
        self._bar_config = kwargs

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A tqdm bar with this pipeline's settings, over the iterable or up to the total."""
        return bar_over(self._bar_config, iterable, total)

    def _update(self, settings: pipeline_service_pb2.PipelineSettings, path: str) -> None:
        self._info = self._client.update(self.name, settings, [path])

    def __getattr__(self, name: str) -> Any:
        # Set first: not there in an object that is being made.
        if name in Pipeline.__slots__:
            raise AttributeError(name)
        if name in self._state:
            return self._state[name]
        parts = description.describe_components(self.refresh()._info, self._feature)
        if name in parts:
            return parts[name]
        if several := [part for role, part in parts.items() if role.startswith(f"{name}[")]:
            return several
        config = self.config
        if isinstance(config.get(name), tuple):
            return None  # a component that was left out
        known = {*parts, *self._state, *dir(type(self))}
        there_is = ", ".join(sorted(each for each in known if not each.startswith("_")))
        raise AttributeError(f"A remote pipeline has no {name!r}. There is: {there_is}.", name=name, obj=self)

    def __setattr__(self, name: str, value: object) -> None:
        if name in Pipeline.__slots__ or description.is_settable(type(self), name):
            object.__setattr__(self, name, value)
        elif name == "scheduler":
            raise AttributeError("Setting it takes a call: use set_scheduler(…).", name=name, obj=self)
        elif name in self._state:
            self._state[name] = value
            # What the property of that name would give.
            if (shown := name.removeprefix("_")) in self._state:
                self._state[shown] = value
        else:
            raise AttributeError(
                f"{name!r} of a remote pipeline cannot be set. Name what to replace in from_pretrained or from_pipe.",
                name=name,
                obj=self,
            )

    def __repr__(self) -> str:
        return description.as_text(self._info, self._client.target)

    def _repr_html_(self) -> str:
        return description.as_html(self._info, self._client.target)

"""References to components: what `from_pretrained` of a model class gives where the weights live in a daemon."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn, Self

import numpy as np

from .errors import InvalidFieldError, UnsupportedError
from .noise_scheduler import NoiseScheduler
from .spec import DTYPE_ALIASES, WEIGHT_DTYPES, dtype_number, full_name, one_of, source, suggest
from .v1 import pipeline_service_pb2 as pb
from .values import Plain, to_proto

# What is in a component's directory.
CONFIGS = ("model_index.json", "config.json", "scheduler_config.json")
CLASS = re.compile(r"[A-Z][A-Za-z0-9]*")
# Arguments of diffusers' from_pretrained that steer how this process would read files; the daemon reads them.
IGNORED = frozenset(
    {"cache_dir", "device_map", "force_download", "local_files_only", "low_cpu_mem_usage", "mirror", "proxies",
     "resume_download", "return_unused_kwargs", "use_fast"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Component:
    """A component that the daemon is to use: a lazy reference, resolved when a pipeline is loaded or derived with it.

        controlnet = denoised.ControlNetModel.from_pretrained("lllyasviel/sd-controlnet-canny")
        pipe = AutoPipelineForText2Image.from_pretrained(repo, controlnet=controlnet, vae=other_pipe.components["vae"])

    Every class of diffusers and transformers can be named so, as an attribute of `denoised`; `Component(repo)` leaves
    the class to the repository.

    Attributes:
        repo_id: Repository on the Hub, directory that the daemon may read, or embedded model.
        subfolder: Folder inside the repository.
        class_name: Class to build it as, such as "ControlNetModel". Empty for the one that the repository names.
        revision: Branch, tag or commit. Empty for "main".
        variant: Weight variant, such as "fp16". Empty for the plain weights.
        dtype: Element type of its weights: a torch.dtype or its name. None for the pipeline's.
        use_safetensors: True for safetensors files only, False for pickled files only, None for what is there.
        config: Configuration of a noise scheduler: all of it, or entries to replace where there is a repository.
        pipeline: Live pipeline that has the component, "pipelines/{id}", instead of a repository.
        role: Its role in that pipeline.
    """

    repo_id: str = ""
    subfolder: str = ""
    class_name: str = ""
    revision: str = ""
    variant: str = ""
    dtype: Any = None
    use_safetensors: bool | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    pipeline: str = ""
    role: str = ""

    _class_name: ClassVar[str] = ""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        torch_dtype: Any = None,
        dtype: Any = None,
        use_safetensors: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Names a component of a repository; nothing is read yet.

        Args:
            pretrained_model_name_or_path: Repository, directory that the daemon may read, or embedded model.
            subfolder: Folder inside the repository.
            revision: Branch, tag or commit. Defaults to "main".
            variant: Weight variant, such as "fp16".
            torch_dtype: The older name of `dtype`.
            dtype: Element type of its weights. Defaults to that of the pipeline it becomes part of.
            use_safetensors: True for safetensors files only, False for pickled files only, None for what is there.
            **kwargs: For a noise scheduler, entries of its configuration to replace.

        Raises:
            InvalidFieldError: An argument is unknown, or of the wrong type.
        """
        dtype = torch_dtype if dtype is None else dtype
        if dtype is not None:
            dtype_number(dtype)
        given = {name: value for name, value in kwargs.items() if name not in IGNORED}
        if not cls._class_name.endswith("Scheduler"):
            known = ("subfolder", "revision", "variant", "torch_dtype", "dtype", "use_safetensors", *IGNORED)
            for name in given:
                raise InvalidFieldError.of(
                    name, "there is no such argument.", hint=suggest(name, known) or one_of(sorted(known))
                )
        return cls(
            repo_id=source(pretrained_model_name_or_path, CONFIGS),
            subfolder=subfolder or "",
            class_name=cls._class_name,
            revision=revision or "",
            variant=variant or "",
            dtype=dtype,
            use_safetensors=use_safetensors,
            config=_plain(given),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **kwargs: Any) -> Self:
        """Names a noise scheduler by its configuration, such as `pipe.scheduler.config`.

        Args:
            config: The configuration.
            **kwargs: Entries to replace.

        Raises:
            InvalidFieldError: A value of it cannot be sent.
        """
        return cls(class_name=cls._class_name, config=_plain({**config, **kwargs}))

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str | os.PathLike[str], **kwargs: Any) -> NoReturn:
        """Not supported. Raises UnsupportedError, with what to do instead."""
        raise UnsupportedError(
            f"{cls.__name__}.from_single_file: the daemon loads components in diffusers' own layout only.",
            hint="Convert it once with `from_single_file` of its diffusers class and `save_pretrained`, and name that.",
        )

    def __repr__(self) -> str:
        # The configuration of a live component is long.
        fields = [each.name for each in dataclasses.fields(self) if each.repr]
        names = [name for name in fields if not (name == "config" and self.pipeline)]
        given = {name: getattr(self, name) for name in names}
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items() if value not in ("", None, {}, 0))
        return f"{type(self).__name__}({shown})"

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The same component, with the element type if one is named: which device it is on decides the daemon."""
        for arg in (*args, *kwargs.values()):
            # A torch.dtype says "torch.float16", a device "cuda:0".
            if str(arg).removeprefix("torch.") in (*WEIGHT_DTYPES, *DTYPE_ALIASES):
                return dataclasses.replace(self, dtype=arg)
        return self


@functools.cache
def reference_class(name: str) -> type[Component]:
    """The class of references to components of that class of diffusers or transformers."""
    members = {"__module__": "denoised", "__qualname__": name, "__slots__": (), "_class_name": name}
    members["__doc__"] = f"References to {name} components; see `denoised.Component`."
    return type(name, (Component,), members)


def reference_class_of(module: str, name: str, public: Sequence[str]) -> type[Component]:
    """What the attribute `name` of a module of ours is, beside its public names. Raises AttributeError."""
    near = difflib.get_close_matches(name, public, 1, 0.8)
    if CLASS.fullmatch(name) is None or near or name.endswith(("Pipeline", "Error")):
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module {module!r} has no attribute {name!r}.{meant}", name=name)
    return reference_class(name)


def overrides(values: Mapping[str, Any]) -> dict[str, pb.Override]:
    """What to put in place of components and options. Raises UnsupportedError for objects that live in this process."""
    return {role: _override(role, value) for role, value in values.items()}


def config_source(config: str | os.PathLike[str] | Component) -> pb.ComponentSource:
    """What describes the weights in a single file."""
    if isinstance(config, Component):
        return _source("config", config)
    return pb.ComponentSource(repo_id=source(config))


def _override(role: str, value: Any) -> pb.Override:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return pb.Override(value=to_proto(value))
    if isinstance(value, list | tuple) and not all(isinstance(item, bool | int | float | str) for item in value):
        return pb.Override(components=pb.ComponentList(components=[_source(role, item) for item in value]))
    if isinstance(value, list | tuple):
        return pb.Override(value=to_proto(value))
    return pb.Override(component=_source(role, value))


def _source(role: str, value: Any) -> pb.ComponentSource:
    if not isinstance(value, Component):
        value = _from_object(role, value)
    return pb.ComponentSource(
        repo_id=source(value.repo_id, CONFIGS) if value.repo_id else "",
        subfolder=value.subfolder,
        revision=value.revision,
        variant=value.variant,
        class_name=value.class_name if not value.pipeline else "",
        pipeline=full_name(value.pipeline),
        role=value.role if value.pipeline else "",
        config={name: to_proto(item) for name, item in _plain(value.config if not value.pipeline else {}).items()},
        dtype=dtype_number(value.dtype) if not value.pipeline else dtype_number(None),
        use_safetensors=value.use_safetensors,
    )


def _from_object(role: str, value: Any) -> Component:
    """A noise scheduler of diffusers is its configuration; everything else stays where it is."""
    name, module = type(value).__name__, type(value).__module__
    config = getattr(value, "config", None)
    is_scheduler = hasattr(value, "set_timesteps") or isinstance(value, NoiseScheduler)
    if is_scheduler and isinstance(config, Mapping):
        return Component(class_name=name, config=_plain(config))
    if module.startswith(("diffusers", "transformers")):
        hint = f"Name it instead: denoised.{name}.from_pretrained(…), or a component of another remote pipeline."
    else:
        hint = "Save it where the daemon can read it, and name it with denoised.Component(…)."
    raise UnsupportedError(
        f"{role}: a {module}.{name} lives in this process, and its weights cannot be sent to the daemon.", hint=hint
    )


def _plain(config: Mapping[str, Any]) -> dict[str, Plain]:
    return {name: _plain_value(name, value) for name, value in config.items()}


def _plain_value(name: str, value: Any) -> Plain:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain_value(name, item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain_value(name, item) for key, item in value.items()}
    raise InvalidFieldError.of(name, f"a {type(value).__name__} cannot be sent.", hint="Send numbers, texts or lists.")

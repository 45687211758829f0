"""Adapters of single requests."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from . import spec
from .errors import InvalidFieldError, UnsupportedError
from .v1 import adapter_pb2
from .values import to_proto

# A number, or numbers by component and block: {"unet": {"down": 0.9}, "text_encoder": 0.5}.
Scale: TypeAlias = float | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA for one call: `pipe(prompt, adapters=[Adapter("owner/style", scale=0.8)])`.

    The daemon loads it once, keeps it for a while, and runs calls with different ones side by side.

    Attributes:
        source: A repository on the Hub, a directory that the daemon may read, or the name of an adapter that the
            pipeline has loaded.
        scale: How strong it is; a number, or numbers by component and block as `set_adapters` takes them.
        weight_name: The file, which ends in ".safetensors". Defaults to the one that diffusers would choose.
        subfolder: Folder inside the repository.
        revision: Branch, tag or commit. Defaults to "main".
    """

    source: str | os.PathLike[str]
    scale: Scale = 1.0
    weight_name: str = ""
    subfolder: str = ""
    revision: str = ""


# Arguments of diffusers' methods that say how this process would read files.
IGNORED = frozenset(
    {"cache_dir", "force_download", "local_files_only", "low_cpu_mem_usage", "mirror", "resume_download"}
)
REFUSED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "hotswap": ((False,), "Load it under another name and use set_adapters."),
    "hf_token": ((None, False), "Log in to the Hub where the daemon runs."),
    "proxies": ((None,), "Set HTTPS_PROXY where the daemon runs."),
    "token": ((None, False), "Log in to the Hub where the daemon runs."),
    "use_safetensors": ((None, True), "The daemon reads adapters from safetensors only."),
}

# Names, names with scales, or whole adapters.
Adapters: TypeAlias = Sequence[Adapter | str] | Mapping[str, Scale]


def select(adapters: Adapters, loaded: Sequence[str]) -> adapter_pb2.AdapterSelection:
    """Raises InvalidFieldError for what is none. `loaded` are the names of those that the pipeline has."""
    if isinstance(adapters, str | bytes) or not isinstance(adapters, Sequence | Mapping):
        raise InvalidFieldError.of("adapters", "it is no list.", hint='For example [denoised.Adapter("owner/style")].')
    if isinstance(adapters, Mapping):
        adapters = [Adapter(name, scale) for name, scale in adapters.items()]
    return adapter_pb2.AdapterSelection(adapters=[_message(each, loaded) for each in adapters])


def source_message(
    repo_id: str | os.PathLike[str], *, weight_name: str = "", subfolder: str = "", revision: str = ""
) -> adapter_pb2.AdapterSource:
    """Raises UnsupportedError for weights that are in this process."""
    if not isinstance(repo_id, str | os.PathLike):
        raise UnsupportedError(
            f"Weights of an adapter cannot be sent as a {type(repo_id).__name__}.",
            hint="Save them with safetensors into a directory that the daemon may read, and name that.",
        )
    return adapter_pb2.AdapterSource(
        repo_id=spec.source(repo_id), weight_name=weight_name, subfolder=subfolder, revision=revision
    )


def source_messages(
    repo_ids: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    subfolders: str | Sequence[str],
    weight_names: str | Sequence[str],
    *,
    revision: str,
) -> list[adapter_pb2.AdapterSource]:
    """One for each file; a single repository or folder stands for all. Raises InvalidFieldError when counts differ."""
    names = [weight_names] if isinstance(weight_names, str) else [*weight_names]
    folders = [subfolders] if isinstance(subfolders, str) else [*subfolders]
    repos = [repo_ids] if isinstance(repo_ids, str | os.PathLike) else [*repo_ids]
    folders = folders * len(names) if len(folders) == 1 else folders
    repos = repos * len(names) if len(repos) == 1 else repos
    if not len(names) == len(folders) == len(repos):
        raise InvalidFieldError.of(
            "weight_name",
            f"there are {len(names)} files, {len(folders)} folders and {len(repos)} repositories.",
            hint="Give one folder and repository for each file, or one for all.",
        )
    return [
        source_message(repo, weight_name=name, subfolder=folder or "", revision=revision)
        for repo, name, folder in zip(repos, names, folders, strict=True)
    ]


def call_message(
    method: str, sources: Sequence[adapter_pb2.AdapterSource], arguments: Mapping[str, Any]
) -> adapter_pb2.AdapterCall:
    """Without what is None, which is diffusers' default but for the image encoder. Raises InvalidFieldError."""
    message = adapter_pb2.AdapterCall(method=method, sources=sources)
    for name, value in arguments.items():
        if value is None and name != "image_encoder_folder":
            continue
        if name in ("lora_scale", "scale"):
            checked_scale(value, name)
        try:
            message.arguments[name].CopyFrom(to_proto(value))
        except (TypeError, OverflowError) as error:
            raise InvalidFieldError.of(name, f"{error}.") from error
    return message


def check_ignored(method: str, arguments: Mapping[str, Any]) -> None:
    """Raises UnsupportedError for what would change something and cannot, and TypeError for unknown names."""
    for name, value in arguments.items():
        if name not in IGNORED and name not in REFUSED:
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}")
        if name in REFUSED and value not in REFUSED[name][0]:
            raise UnsupportedError(f"{name}: {value!r} cannot be had.", hint=REFUSED[name][1])


def _message(adapter: Adapter | str, loaded: Sequence[str]) -> adapter_pb2.Adapter:
    if isinstance(adapter, str):
        adapter = Adapter(adapter)
    if not isinstance(adapter, Adapter):
        raise InvalidFieldError.of(
            "adapters", f"a {type(adapter).__name__} is no adapter.", hint="Use denoised.Adapter."
        )
    message = adapter_pb2.Adapter(scale=to_proto(checked_scale(adapter.scale, "adapters")))
    if isinstance(adapter.source, str) and adapter.source in loaded:
        message.name = adapter.source
    else:
        message.source.CopyFrom(
            source_message(
                adapter.source,
                weight_name=adapter.weight_name,
                subfolder=adapter.subfolder,
                revision=adapter.revision,
            )
        )
    return message


def checked_scale(scale: Any, field: str) -> Any:
    """Raises InvalidFieldError for what cannot be one."""
    if isinstance(scale, Mapping):
        return {str(name): checked_scale(item, field) for name, item in scale.items()}
    if isinstance(scale, list | tuple):
        return [checked_scale(item, field) for item in scale]
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise InvalidFieldError.of(
            field, f"the scale {scale!r} is no finite number.", hint="Give a number, or numbers by component and block."
        )
    return scale

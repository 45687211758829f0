"""Adapters of single requests."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from . import spec
from .errors import InvalidFieldError
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
    return adapter_pb2.AdapterSource(
        repo_id=spec.source(repo_id), weight_name=weight_name, subfolder=subfolder, revision=revision
    )


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

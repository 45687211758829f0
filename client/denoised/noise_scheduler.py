"""Noise schedulers of remote pipelines: what one has, and what it is to have."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from .config import FrozenDict, from_entries
from .errors import InvalidFieldError
from .media import pack
from .v1 import artifact_pb2 as pb
from .values import Plain, to_proto

# A class name of diffusers, arguments to put over the present one's, both, or an object: of diffusers, of
# `denoised.DDIMScheduler.from_config(…)`, or of another remote pipeline.
NoiseSchedulerLike: TypeAlias = "str | Mapping[str, Any] | tuple[str, Mapping[str, Any]] | NoiseScheduler | Any"


class NoiseScheduler:
    """The noise scheduler of a remote pipeline, as far as it can be seen from here.

    Its class has the name of the remote one. To have another one, assign it to `pipe.scheduler`:

        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler = "EulerDiscreteScheduler"

    Attributes:
        config: Its configuration, with attributes and keys as in diffusers.
    """

    __slots__ = ("config",)

    def __init__(self, config: FrozenDict) -> None:
        self.config = config

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"A remote noise scheduler shows its config only, and {name!r} is not there.", name=name, obj=self
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoiseScheduler) and type(self) is type(other) and self.config == other.config

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.config, indent=2, sort_keys=True, default=str)}"


def from_message(message: pb.NoiseScheduler) -> NoiseScheduler:
    return _class(message.class_name or "NoiseScheduler")(from_entries(message.config.entries))


def to_message(scheduler: NoiseSchedulerLike, field: str = "scheduler") -> pb.NoiseScheduler:
    """Raises InvalidFieldError for what is no noise scheduler."""
    match scheduler:
        case str():
            return pb.NoiseScheduler(class_name=scheduler)
        case (str(name), Mapping() as overrides):
            return pb.NoiseScheduler(class_name=name, overrides=_entries(overrides, field))
        case Mapping():
            return pb.NoiseScheduler(overrides=_entries(scheduler, field))
        case type():
            return pb.NoiseScheduler(class_name=scheduler.__name__)
    # References of ours name the class; a noise scheduler of diffusers is an instance of it.
    name = getattr(scheduler, "class_name", "") or type(scheduler).__name__
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping) or not (name.endswith("Scheduler") or hasattr(scheduler, "set_timesteps")):
        raise InvalidFieldError.of(
            field,
            f"a {type(scheduler).__name__} is no noise scheduler.",
            hint='Give a class name such as "EulerDiscreteScheduler", or EulerDiscreteScheduler.from_config(…).',
        )
    if getattr(scheduler, "repo_id", ""):
        raise InvalidFieldError.of(
            field,
            "a noise scheduler of another repository is named when loading.",
            hint=f"Use {name}.from_config(pipe.scheduler.config), or scheduler= of from_pretrained and from_pipe.",
        )
    return pb.NoiseScheduler(class_name=name, config=pb.MapValue(entries=_entries(config, field)))


def _entries(values: Mapping[str, Any], field: str) -> dict[str, pb.Value]:
    try:
        return {str(name): to_proto(_plain(value)) for name, value in values.items()}
    except (TypeError, OverflowError) as error:
        raise InvalidFieldError.of(field, f"{error}.") from error


def _plain(value: Any) -> Plain:
    # Tables of betas, as lists: so they are in a configuration file.
    return pack(value.tolist() if hasattr(value, "tolist") else value)


@functools.cache
def _class(name: str) -> type[NoiseScheduler]:
    members = {"__slots__": (), "__module__": "denoised", "__doc__": NoiseScheduler.__doc__}
    return type(name, (NoiseScheduler,), members)

"""Noise schedulers by class name and configuration."""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import diffusers
import torch
from denoised import media
from denoised.allowance import NUMBERS_ONLY
from denoised.errors import DenoisedError, InvalidNoiseSchedulerError
from denoised_server.messages import NoiseScheduler
from diffusers import SchedulerMixin

from . import plain_config
from .quotation import quote

# Schedulers make tables of this many numbers, before anybody asks what they are good for.
MAX_TRAIN_TIMESTEPS = 100_000


def copied(scheduler: Any) -> Any:
    """Another one in the same state, for one request to step."""
    state = vars(scheduler)
    # Said beforehand, because copy.deepcopy takes several times as long for them.
    known: dict[int, Any] = {id(value): value.clone() for value in state.values() if isinstance(value, torch.Tensor)}
    if (config := state.get("_internal_dict")) is not None:
        # Never changed in place.
        known[id(config)] = config
    return copy.deepcopy(scheduler, known)


def make(wanted: NoiseScheduler, present: Any) -> Any:
    """The noise scheduler that was asked for, in place of the present one. Raises InvalidNoiseSchedulerError."""
    kind = _class(wanted.class_name or type(present).__name__)
    config = dict(present.config) if wanted.config is None else {**wanted.config}
    overrides = dict(wanted.overrides)
    _check_names(overrides, _arguments(kind), kind, "overrides")
    if wanted.config is not None:
        _check_names(config, _all_arguments() | set(present.config), kind, "config")
    for name, value in (*config.items(), *overrides.items()):
        if name == "num_train_timesteps" and not (isinstance(value, int) and 1 <= value <= MAX_TRAIN_TIMESTEPS):
            raise InvalidNoiseSchedulerError(
                f"num_train_timesteps {value!r} is out of range.", hint=f"Send 1 to {MAX_TRAIN_TIMESTEPS:,}."
            )
        if isinstance(value, list | tuple) and len(value) > MAX_TRAIN_TIMESTEPS:
            raise InvalidNoiseSchedulerError(
                f"{name} has {len(value):,} elements.", hint=f"Send at most {MAX_TRAIN_TIMESTEPS:,}."
            )
    try:
        return kind.from_config(
            {name: media.unpack(value, NUMBERS_ONLY) for name, value in config.items()},
            **{name: media.unpack(value, NUMBERS_ONLY) for name, value in overrides.items()},
        )
    except DenoisedError:
        raise
    except Exception as error:
        # Configurations are checked by nothing but the arithmetic that they enter.
        raise InvalidNoiseSchedulerError(
            f"A {kind.__name__} cannot be configured this way: {quote(error) or type(error).__name__}.",
            hint=f"It takes {', '.join(sorted(_arguments(kind)))}.",
        ) from None


def describe(scheduler: Any) -> NoiseScheduler | None:
    """Class and whole configuration of what a pipeline has as its noise scheduler, if that is one."""
    if not isinstance(scheduler, SchedulerMixin):
        return None
    return NoiseScheduler(type(scheduler).__name__, plain_config.of(scheduler))


def _class(name: str) -> Any:
    found = getattr(diffusers, name, None)
    if inspect.isclass(found) and issubclass(found, SchedulerMixin) and found is not SchedulerMixin:
        return found
    near = difflib.get_close_matches(name[:64], _classes(), 1)
    raise InvalidNoiseSchedulerError(
        f"diffusers has no noise scheduler {name[:64]!r}.",
        hint=f"Did you mean {near[0]!r}?" if near else "For example EulerDiscreteScheduler.",
    )


@functools.cache
def _classes() -> dict[str, Any]:
    def every() -> Iterator[tuple[str, Any]]:
        for name in dir(diffusers):
            if name.endswith("Scheduler"):
                kind = getattr(diffusers, name, None)
                if inspect.isclass(kind) and issubclass(kind, SchedulerMixin):
                    yield name, kind

    return dict(every())


def _arguments(kind: Any) -> set[str]:
    return set(kind._get_init_keys(kind)) - {"self", "kwargs"}


@functools.cache
def _all_arguments() -> set[str]:
    return {name for kind in _classes().values() for name in _arguments(kind)}


def _check_names(names: Iterable[str], known: Iterable[str], kind: Any, where: str) -> None:
    """diffusers only warns about names that it does not know."""
    known = set(known)
    for name in names:
        if name not in known and not (where == "config" and name.startswith("_")):
            near = difflib.get_close_matches(name[:64], known, 1)
            raise InvalidNoiseSchedulerError(
                f"A {kind.__name__} takes no {name[:64]!r} in its {where}.",
                hint=f"Did you mean {near[0]!r}?" if near else f"It takes {', '.join(sorted(_arguments(kind)))}.",
            )

"""What a pipeline's `__call__` takes."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import types
import typing
from typing import Any

import numpy as np
import torch
from denoised_server.messages import Parameter
from PIL import Image

KINDS: dict[Any, str] = {
    type(None): "none",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    list: "list",
    tuple: "list",
    collections.abc.Sequence: "list",
    dict: "dict",
    torch.Tensor: "tensor",
    torch.FloatTensor: "tensor",
    np.ndarray: "ndarray",
    Image.Image: "image",
}


@functools.cache
def parameters(pipeline_class: Any, method: str = "__call__") -> tuple[Parameter, ...]:
    """In the order of the signature, `self` and catch-alls left out; none for a method that there is not."""
    found: list[Parameter] = []
    if not hasattr(pipeline_class, method):
        return ()
    for parameter in list(inspect.signature(getattr(pipeline_class, method)).parameters.values())[1:]:
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            continue
        required = parameter.default is inspect.Parameter.empty
        plain = parameter.default is None or isinstance(parameter.default, bool | int | float | str)
        annotation = "" if parameter.annotation is inspect.Parameter.empty else _spell(parameter.annotation)
        found.append(
            Parameter(
                name=parameter.name,
                annotation=annotation,
                kinds=_kinds(parameter),
                required=required,
                default=parameter.default if plain and not required else None,
                has_default=plain and not required,
            )
        )
    return tuple(found)


def _kinds(parameter: inspect.Parameter) -> frozenset[str]:
    """Plain kinds that the annotation allows; empty when it says nothing that can be checked."""
    if parameter.annotation is inspect.Parameter.empty or isinstance(parameter.annotation, str):
        return frozenset()
    kinds = {KINDS.get(member, "") for member in _members(parameter.annotation)}
    if "" in kinds:
        return frozenset()
    # Annotations are narrower than what diffusers takes: images come in every form, and arrays stand in for lists.
    if "image" in kinds:
        kinds |= {"list", "ndarray", "tensor"}
    if "list" in kinds:
        kinds |= {"ndarray", "tensor"}
    # None does without what a list has by default.
    if parameter.default is None or isinstance(parameter.default, list | tuple):
        kinds.add("none")
    return frozenset(kinds)


def _members(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    return [origin or annotation]


def _spell(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)

"""Messages as JSON, for what outlives the process.

Every value says itself what it is, so that a field added to a message needs no line here: one that was written without
it gets the field's default, and one that has a field which there is no more loses it.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from denoised.values import Artifact

from . import messages

KINDS: dict[str, Any] = {
    name: kind for name, kind in vars(messages).items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)
} | {"Artifact": Artifact}
T = TypeVar("T")
# What JSON has no word for is an object with this key.
TAG = "@"


def kept(kind: type[T]) -> type[T]:
    """Marks a dataclass that is none of the messages to workers, and is kept too."""
    KINDS[kind.__name__] = kind
    return kind


def encode(value: object) -> str:
    """Raises TypeError for what is neither plain nor a message."""
    return json.dumps(_tag(value), separators=(",", ":"), ensure_ascii=False)


def decode(text: str) -> Any:
    """Raises ValueError for what cannot be read."""
    try:
        return _untag(json.loads(text))
    except (KeyError, TypeError) as error:
        raise ValueError(f"it was written by another version ({error})") from error


def _tag(value: object) -> Any:
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            # An enum of texts is its text.
            return str(value)
        case bytes():
            return {TAG: "bytes", "value": base64.b64encode(value).decode()}
        case list():
            return [_tag(item) for item in value]
        case tuple():
            return {TAG: "tuple", "value": [_tag(item) for item in value]}
        case frozenset():
            return {TAG: "frozenset", "value": sorted(_tag(item) for item in value)}
        case Mapping():
            pairs = {str(key): _tag(item) for key, item in value.items()}
            return {TAG: "dict", "value": pairs} if TAG in pairs else pairs
    name = type(value).__name__
    if KINDS.get(name) is not type(value):
        raise TypeError(f"a {name} cannot be kept")
    fields = {field.name: _tag(getattr(value, field.name)) for field in dataclasses.fields(value)}  # type: ignore[arg-type]
    return {TAG: name, **fields}


def _untag(data: Any) -> Any:
    if isinstance(data, list):
        return [_untag(item) for item in data]
    if not isinstance(data, dict):
        return data
    match data.get(TAG):
        case None:
            return {key: _untag(item) for key, item in data.items()}
        case "dict":
            return {key: _untag(item) for key, item in data["value"].items()}
        case "bytes":
            return base64.b64decode(data["value"])
        case "tuple":
            return tuple(_untag(item) for item in data["value"])
        case "frozenset":
            return frozenset(data["value"])
    kind = KINDS[data[TAG]]
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{key: _untag(item) for key, item in data.items() if key in known})

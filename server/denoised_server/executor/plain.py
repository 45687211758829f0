"""Messages as bytes, in MessagePack: what is read can become a message or a plain value, and nothing else.

Not pickle: a worker that somebody has taken over must not be able to make the front-end run its code.

MessagePack knows lists and not tuples. What it has no word for is a list that begins with a mark, which no other list
can: a tuple, a set, an error, or a message with its fields in order. Large bytes, which are pictures and tensors,
follow the rest as they are, so that they are not copied on their way.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from operator import attrgetter
from typing import Any

import msgpack
import numpy as np
from denoised import errors
from denoised.errors import DenoisedError, InternalError
from denoised.values import Artifact

from .. import messages
from ..request_context import RequestContext

# Both ends are one version of the same program: names need not travel.
KINDS: tuple[Any, ...] = (
    # Artifact is one of them.
    *(kind for kind in vars(messages).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)),
    RequestContext,
)
ERRORS = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, DenoisedError)
}
TUPLE, SET, INTEGER, ERROR, BYTES = range(5)
FIRST_KIND = 5
# Bytes that are worth a piece of their own.
LARGE = 16 * 1024
# Lone surrogates, which a prompt may have, are no UTF-8.
TEXT = "surrogatepass"


# A packer has one buffer, and its hooks take no argument beside the value. The pieces are there for as long as they
# work: a picture would otherwise stay in memory until the next message.
_local = threading.local()


class _Mark:
    """What the list that it begins is to become."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[[list[Any]], Any]) -> None:
        self.make = make


def _fields(kind: Any) -> Callable[[Any], Sequence[Any]]:
    names = [field.name for field in dataclasses.fields(kind)]
    if len(names) > 1:
        return attrgetter(*names)
    return lambda message: [getattr(message, name) for name in names]


def _error(fields: list[Any]) -> DenoisedError:
    name, message, hint, retry_after, metadata = fields
    return ERRORS.get(name, InternalError)(message, hint=hint, retry_after=retry_after, metadata=metadata)


def _bytes(fields: list[Any]) -> bytes:
    return bytes(_local.pieces[fields[0]])


def _build(kind: Any) -> Callable[[list[Any]], Any]:
    return lambda fields: kind(*fields)


_MARKS = {code: msgpack.ExtType(code, b"") for code in range(FIRST_KIND + len(KINDS))}
_WRITE = {kind: (_MARKS[code], _fields(kind)) for code, kind in enumerate(KINDS, FIRST_KIND)}
_READ = {
    BYTES: _Mark(_bytes),
    TUPLE: _Mark(tuple),
    SET: _Mark(frozenset),
    INTEGER: _Mark(lambda fields: int(fields[0])),
    ERROR: _Mark(_error),
} | {code: _Mark(_build(kind)) for code, kind in enumerate(KINDS, FIRST_KIND)}


def dumps(message: object) -> list[bytes]:
    """The pieces of a message: what it is, and the large bytes in it. Raises TypeError for what is not plain."""
    if not hasattr(_local, "packer"):
        _local.packer = msgpack.Packer(default=_mark, strict_types=True, unicode_errors=TEXT)
    pieces: list[bytes] = []
    _local.pieces = pieces
    try:
        return [_local.packer.pack(message), *pieces]
    finally:
        _local.pieces = ()


def loads(data: bytes | memoryview, pieces: Sequence[memoryview] = ()) -> Any:
    """Raises ValueError, TypeError or LookupError for what no `dumps` has made."""
    _local.pieces = pieces
    try:
        return msgpack.unpackb(data, list_hook=_unmark, ext_hook=_marked, strict_map_key=False, unicode_errors=TEXT)
    finally:
        _local.pieces = ()


def _mark(value: Any) -> Any:
    kind = type(value)
    if kind is tuple:
        return [_MARKS[TUPLE], *value]
    if kind is Artifact and type(value.data) is bytes and len(value.data) >= LARGE:
        _local.pieces.append(value.data)
        place = [_MARKS[BYTES], len(_local.pieces) - 1]
        return [_WRITE[kind][0], value.media_type, place, value.dtype, value.shape, value.dim_order]
    if (known := _WRITE.get(kind)) is not None:
        mark, fields = known
        return [mark, *fields(value)]
    match value:
        case DenoisedError():
            return [_MARKS[ERROR], kind.__name__, value.message, value.hint, value.retry_after, value.metadata]
        case np.generic():
            return value.item()
        case str():
            return str.__str__(value)
        case int():
            # MessagePack's have 64 bits.
            return [_MARKS[INTEGER], str(int(value))]
        case float():
            return float(value)
        case AbstractSet():
            return [_MARKS[SET], *value]
        case Mapping():
            return dict(value)
        case list():
            return list(value)
        case tuple():
            return tuple(value)
    raise TypeError(f"a {kind.__name__} is no plain value")


def _marked(code: int, data: bytes) -> _Mark:
    try:
        return _READ[code]
    except KeyError:
        raise ValueError(f"there is no kind {code} of message") from None


def _unmark(items: list[Any]) -> Any:
    if items and type(items[0]) is _Mark:
        return items[0].make(items[1:])
    return items

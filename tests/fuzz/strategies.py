"""Messages of any type, drawn from their descriptors: what the protos can say, said in every way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

# Deep enough for lists in maps in lists; deeper ones are made by a test of their own.
DEPTH = 4
INTEGERS = (0, 1, -1, 2, 7, 8, 63, 64, 1000, 1001, 2**31 - 1, -(2**31))
WIDE_INTEGERS = (*INTEGERS, 2**32, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 1e300, math.inf, -math.inf, math.nan)
TEXTS = ("", " ", "\0", "..", "/", "/etc", "~root", "pipelines/", "pipelines/none", "workers/0", "http://localhost/x")
MEDIA = ("image/png", "image/jpeg", "image/webp", "image/gif", "application/x-tensor", "application/x-ndarray")


def messages(descriptor: Descriptor, words: Sequence[str], depth: int = DEPTH) -> st.SearchStrategy[Message]:
    """Messages with some of their fields set; `words` are texts that mean something to the daemon."""

    @st.composite
    def draw_message(draw: st.DrawFn) -> Message:
        message: Message = GetMessageClass(descriptor)()
        fields = [field for field in descriptor.fields if depth > 0 or field.message_type is None]
        chosen = (
            draw(st.lists(st.sampled_from(fields), max_size=4, unique_by=lambda field: field.number)) if fields else []
        )
        for field in chosen:
            _set(draw, message, field, words, depth)
        return message

    return draw_message()


def _set(draw: st.DrawFn, message: Any, field: FieldDescriptor, words: Sequence[str], depth: int) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name
        for key in draw(st.lists(_scalars(entry["key"], words), max_size=3)):
            if entry["value"].message_type is None:
                getattr(message, field.name)[key] = draw(_scalars(entry["value"], words))
            else:
                value = draw(messages(entry["value"].message_type, words, depth - 1))
                getattr(message, field.name)[key].CopyFrom(value)
    elif field.is_repeated:
        kinds = messages(field.message_type, words, depth - 1) if field.message_type else _scalars(field, words)
        getattr(message, field.name).extend(draw(st.lists(kinds, max_size=4)))
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(draw(messages(field.message_type, words, depth - 1)))
    else:
        setattr(message, field.name, draw(_scalars(field, words)))


def _scalars(field: FieldDescriptor, words: Sequence[str]) -> st.SearchStrategy[Any]:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_ENUM:
            kind: Any = field.enum_type
            known = [value.number for value in kind.values]
            return st.sampled_from([*known, 99, -1, 2**31 - 1])
        case FieldDescriptor.CPPTYPE_INT32:
            return st.sampled_from(INTEGERS) | st.integers(-(2**31), 2**31 - 1)
        case FieldDescriptor.CPPTYPE_INT64:
            return st.sampled_from(WIDE_INTEGERS) | st.integers(-(2**63), 2**63 - 1)
        case FieldDescriptor.CPPTYPE_UINT32:
            return st.integers(0, 2**32 - 1)
        case FieldDescriptor.CPPTYPE_UINT64:
            return st.integers(0, 2**64 - 1)
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return st.sampled_from(FLOATS) | st.floats(width=32)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=200)
    if field.name == "media_type":
        return st.sampled_from(MEDIA) | st.text(max_size=20)
    long = st.builds(lambda text, times: text * times, st.text(min_size=1, max_size=3), st.sampled_from([100, 2000]))
    # Surrogates cannot be sent at all.
    plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    return st.sampled_from([*words, *TEXTS]) | plain | long.filter(lambda text: text.isprintable())

"""What travels to workers and back: everything comes as it was, and nothing else comes."""

from __future__ import annotations

import dataclasses
import math
import pickle
import sys
from typing import Any

import msgpack
import numpy as np
import pytest
from denoised import errors
from denoised.errors import DenoisedError, InvalidFieldError, QueueFullError
from denoised.values import Artifact
from denoised_server.executor import frames, plain
from denoised_server.messages import Failed, Generate, Loaded, Output, Parameter, Progress, Recipe, Spec
from denoised_server.request_context import RequestContext
from hypothesis import given
from hypothesis import strategies as st

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def there_and_back(message: Any) -> Any:
    data = b"".join(frames.pack(message))
    received: list[Any] = []
    receiver = frames.Frames(received.append, lambda: None)
    while data:
        room = receiver.get_buffer(-1)
        count = min(len(room), len(data))
        room[:count] = data[:count]
        del room
        data = data[count:]
        receiver.buffer_updated(count)
    (found,) = received
    return found


def kinds(value: Any) -> Any:
    """A list and a tuple, or 1 and 1.0 and True, are equal or alike; their types are not."""
    if isinstance(value, list | tuple):
        return type(value), [kinds(item) for item in value]
    if isinstance(value, dict):
        return {key: kinds(item) for key, item in value.items()}
    return type(value)


@given(VALUES)
def test_plain_values_come_as_they_were(value: Any) -> None:
    found = there_and_back(value)
    assert found == value
    assert kinds(found) == kinds(value)


@pytest.mark.parametrize("size", [0, 1, plain.LARGE - 1, plain.LARGE, 3_000_000])
def test_pictures_of_every_size_come_whole(size: int) -> None:
    picture, another = (
        Artifact("image/png", b"a" * size),
        Artifact("application/x-tensor", b"b" * size, "uint8", (size,)),
    )
    message = (
        7,
        Output("images", 0, picture, 1),
        Generate("pipelines/a", {"image": [picture, another], "strength": 1.0}),
    )
    assert there_and_back(message) == message


def test_no_picture_stays_when_its_message_has_gone_or_come() -> None:
    picture = bytes(plain.LARGE)
    message = Output("images", 0, Artifact("image/png", picture), 1)
    before = sys.getrefcount(picture)
    data, *pieces = plain.dumps(message)
    buffer = bytearray(pieces[0])
    del pieces
    assert sys.getrefcount(picture) == before
    assert plain.loads(data, [memoryview(buffer)]) == message
    # Raises where somebody still looks into it.
    buffer.clear()


def test_messages_come_as_they_were() -> None:
    parameter = Parameter("prompt", "str", frozenset({"str", "list"}), default=(1, [2.0, None]), has_default=True)
    loaded = Loaded(
        "inpainting", "P", (), (parameter,), recipe=Recipe(Spec("demo")), config={"big": 2**70, "a": -(2**63)}
    )
    message = (1, loaded, RequestContext("r", trace={"traceparent": "00-1"}), Progress(1, 2, expected_end_time=3.5))
    assert there_and_back(message) == message


def test_what_numbers_of_numpy_and_odd_texts_become() -> None:
    found = there_and_back([np.float32(0.5), np.int64(3), np.str_("a"), "\ud800", math.inf])
    assert found == [0.5, 3, "a", "\ud800", math.inf]
    assert [type(value) for value in found] == [float, int, str, str, float]


@pytest.mark.parametrize("kind", [*errors.BY_REASON.values(), DenoisedError])
def test_every_error_comes_whole(kind: type[DenoisedError]) -> None:
    error = kind("What.", hint="How.", retry_after=1.5, metadata={"field": "a"})
    found = there_and_back(Failed(error)).error
    assert type(found) is kind
    assert (str(found), found.retry_after, found.metadata) == (str(error), 1.5, {"field": "a"})


def test_every_message_has_a_number_of_its_own_and_fits() -> None:
    assert len(set(plain.KINDS)) == len(plain.KINDS)
    assert plain.FIRST_KIND + len(plain.KINDS) <= 128, "MessagePack has so many extensions"
    assert all(dataclasses.is_dataclass(kind) for kind in plain.KINDS)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("it ran",)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Evil()),
        b"",
        b"\xc1",
        b"\xff" * 40,
        msgpack.packb(msgpack.ExtType(127, b"")),
        msgpack.packb([msgpack.ExtType(plain.INTEGER, b""), "x"]),
        msgpack.packb([msgpack.ExtType(plain.BYTES, b""), 3]),
        msgpack.packb([msgpack.ExtType(plain.FIRST_KIND, b""), 1]),
        msgpack.packb([msgpack.ExtType(plain.ERROR, b""), "SystemExit"]),
        b"\x91" * 100_000,
    ],
)
def test_nothing_else_comes(data: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ValueError, TypeError, LookupError)):
        plain.loads(data)
    assert capsys.readouterr().out == ""


def test_an_error_is_one_of_ours_whatever_its_name() -> None:
    mark = msgpack.ExtType(plain.ERROR, b"")
    for name in ("SystemExit", "errors", "os.system", "DenoisedError.__init__"):
        assert isinstance(plain.loads(msgpack.packb([mark, name, "What.", "", None, {}])), DenoisedError)


@pytest.mark.parametrize("value", [object(), Evil(), print, {1: object()}, [InvalidFieldError], QueueFullError])
def test_what_is_not_plain_is_not_sent(value: object) -> None:
    with pytest.raises(TypeError, match="no plain value"):
        frames.pack(value)

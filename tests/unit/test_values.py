from __future__ import annotations

from typing import Any

import pytest
from denoised import values
from denoised.v1 import artifact_pb2
from hypothesis import given
from hypothesis import strategies as st

ARTIFACTS = st.builds(
    values.Artifact,
    st.sampled_from(["image/png", values.TENSOR]),
    st.binary(max_size=8),
    st.sampled_from(["", "float16", "bool"]),
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | ARTIFACTS
)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(PLAIN)
def test_a_plain_value_comes_back_as_it_was(value: Any) -> None:
    sent = artifact_pb2.Value.FromString(values.to_proto(value).SerializeToString())
    back = values.from_proto(sent)
    assert back == value
    assert type(back) is type(value)


def test_a_whole_number_stays_one() -> None:
    assert type(values.from_proto(values.to_proto(2**53 + 1))) is int


def test_true_is_no_number() -> None:
    assert values.to_proto(True).WhichOneof("kind") == "bool_value"


def test_an_empty_list_is_not_nothing() -> None:
    assert values.from_proto(values.to_proto([])) == []
    assert values.from_proto(values.to_proto({})) == {}
    assert values.from_proto(artifact_pb2.Value()) is None


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
def test_integers_beyond_64_bits_are_refused(value: int) -> None:
    with pytest.raises(OverflowError, match="64 bits"):
        values.to_proto(value)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", [object()]])
def test_other_things_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be sent"):
        values.to_proto(value)


def test_every_element_type_has_a_name() -> None:
    numbers = set(artifact_pb2.DataType.values()) - {artifact_pb2.DATA_TYPE_UNSPECIFIED}
    assert set(values.DTYPE_NAMES) == numbers


def test_the_shape_of_an_artifact_survives() -> None:
    artifact = values.Artifact(values.TENSOR, b"\0" * 12, "float16", (1, 2, 3))
    assert values.artifact_from_proto(values.artifact_to_proto(artifact)) == artifact
    scalar = values.Artifact(values.NDARRAY, b"\0" * 4, "float32", ())
    assert values.artifact_from_proto(values.artifact_to_proto(scalar)) == scalar

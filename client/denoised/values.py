"""Plain values of a pipeline call, and `denoised.v1.Value`.

A plain value is None, a bool, an int, a float, a str, an Artifact, or a list or string-keyed dict of plain values.
`denoised.media` turns images, arrays and tensors into Artifacts and back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from google.protobuf import struct_pb2

from .v1 import artifact_pb2 as pb

TENSOR = "application/x-tensor"
NDARRAY = "application/x-ndarray"

# Names as torch and NumPy have them.
DTYPES = {
    "float32": pb.DATA_TYPE_FLOAT32,
    "float16": pb.DATA_TYPE_FLOAT16,
    "bfloat16": pb.DATA_TYPE_BFLOAT16,
    "float64": pb.DATA_TYPE_FLOAT64,
    "uint8": pb.DATA_TYPE_UINT8,
    "int8": pb.DATA_TYPE_INT8,
    "int16": pb.DATA_TYPE_INT16,
    "int32": pb.DATA_TYPE_INT32,
    "int64": pb.DATA_TYPE_INT64,
    "bool": pb.DATA_TYPE_BOOL,
}
DTYPE_NAMES = {number: name for name, number in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Artifact:
    """Encoded media, or numbers with their layout; mirrors `denoised.v1.Artifact`.

    `dim_order` is empty for row-major data.
    """

    media_type: str
    data: bytes
    dtype: str = ""
    shape: tuple[int, ...] = ()
    dim_order: tuple[int, ...] = ()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the content to a file as it is: for sounds and videos, which the SDK does not decode."""
        Path(path).write_bytes(self.data)


Plain: TypeAlias = bool | int | float | str | Artifact | Sequence["Plain"] | Mapping[str, "Plain"] | None


def artifact_to_proto(artifact: Artifact) -> pb.Artifact:
    message = pb.Artifact(media_type=artifact.media_type, data=artifact.data)
    if artifact.dtype:
        message.tensor.dtype = DTYPES[artifact.dtype]
        message.tensor.shape.extend(artifact.shape)
        message.tensor.dim_order.extend(artifact.dim_order)
    return message


def artifact_from_proto(message: pb.Artifact) -> Artifact:
    dtype = DTYPE_NAMES.get(message.tensor.dtype, "") if message.HasField("tensor") else ""
    layout = message.tensor
    return Artifact(message.media_type, message.data, dtype, tuple(layout.shape), tuple(layout.dim_order))


def to_proto(value: Plain) -> pb.Value:
    """Raises TypeError for what is not a plain value, OverflowError for an integer beyond 64 bits."""
    message = pb.Value()
    match value:
        case None:
            message.null_value = struct_pb2.NULL_VALUE
        case bool():
            message.bool_value = value
        case int():
            if not -(2**63) <= value < 2**63:
                raise OverflowError(f"{value} does not fit into 64 bits")
            message.int_value = value
        case float():
            message.double_value = value
        case str():
            message.string_value = value
        case Artifact():
            message.artifact_value.CopyFrom(artifact_to_proto(value))
        case Mapping():
            message.map_value.SetInParent()
            for key, item in value.items():
                message.map_value.entries[key].CopyFrom(to_proto(item))
        case list() | tuple():
            message.list_value.SetInParent()
            message.list_value.values.extend(to_proto(item) for item in value)
        case _:
            raise TypeError(f"a {type(value).__name__} cannot be sent to a pipeline")
    return message


def from_proto(message: pb.Value) -> Plain:
    """An unset value counts as None."""
    match message.WhichOneof("kind"):
        case "bool_value":
            return message.bool_value
        case "int_value":
            return message.int_value
        case "double_value":
            return message.double_value
        case "string_value":
            return message.string_value
        case "artifact_value":
            return artifact_from_proto(message.artifact_value)
        case "list_value":
            return [from_proto(item) for item in message.list_value.values]
        case "map_value":
            return {key: from_proto(item) for key, item in message.map_value.entries.items()}
    return None

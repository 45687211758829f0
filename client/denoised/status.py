"""A DenoisedError as a gRPC status with google.rpc details, and back."""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from . import errors
from .errors import DenoisedError

DOMAIN = "denoised"
DETAILS_KEY = "grpc-status-details-bin"


def to_details(error: DenoisedError) -> bytes:
    """The error as a serialized google.rpc.Status, for the trailing metadata `grpc-status-details-bin`."""
    status = status_pb2.Status(code=getattr(grpc.StatusCode, error.code).value[0], message=str(error))
    metadata = dict(error.metadata)
    if error.hint:
        metadata["hint"] = error.hint
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    if field := error.metadata.get("field"):
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=error.message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    data: bytes = status.SerializeToString()
    return data


def from_call(
    code: grpc.StatusCode | None,
    text: str | None,
    trailing: Iterable[tuple[str, str | bytes]] | None,
    *,
    target: str = "",
) -> DenoisedError:
    """The error that a failed call stands for, whoever sent it."""
    text = text or "the call failed without saying why"
    for key, value in trailing or ():
        if key == DETAILS_KEY and isinstance(value, bytes) and (error := _from_details(value)) is not None:
            return error
    match code:
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.DeadlineExceededError("The call took longer than its timeout.")
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in text:
            return errors.MessageTooLargeError(text, hint="Send smaller or fewer images in one request.")
        case grpc.StatusCode.UNAVAILABLE:
            where = f" at {target}" if target else ""
            return errors.DaemonUnreachableError(
                f"No daemon answers{where} ({text}).", hint="Is `denoised serve` running, and is the target right?"
            )
        case grpc.StatusCode.UNIMPLEMENTED:
            return DenoisedError(
                f"UNIMPLEMENTED: {text}", hint="Is the daemon older than this client, or is it something else?"
            )
    return DenoisedError(f"{code.name if code else 'UNKNOWN'}: {text}")


def _from_details(data: bytes) -> DenoisedError | None:
    try:
        status = status_pb2.Status.FromString(data)
    except DecodeError:
        return None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    retry_after: float | None = None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            detail.Unpack(retry)
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    if info.domain != DOMAIN:
        return None
    metadata = dict(info.metadata)
    hint = metadata.pop("hint", "")
    message = status.message.removesuffix(hint).rstrip() if hint else status.message
    kind = errors.BY_REASON.get(info.reason, DenoisedError)
    return kind(message, hint=hint, retry_after=retry_after, metadata=metadata)

from __future__ import annotations

import pickle

import grpc
import pytest
from denoised import errors, status
from denoised.v1 import error_reason_pb2
from denoised_server import services
from google.rpc import error_details_pb2, status_pb2

from tests.reasons import documented

KINDS = sorted(errors.BY_REASON.values(), key=lambda kind: kind.__name__)


def arrived(error: errors.DenoisedError) -> errors.DenoisedError:
    return status.from_call(None, "", [("other", "x"), (status.DETAILS_KEY, status.to_details(error))])


def test_each_reason_has_one_class_and_each_class_one_reason() -> None:
    reasons = {name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.keys()} - {"UNSPECIFIED"}  # noqa: SIM118
    assert set(errors.BY_REASON) == reasons


def test_each_reason_is_said_of_the_methods_that_may_end_with_it() -> None:
    said = documented()
    assert set(said) == set(services.METHODS)
    assert set[str]().union(*said.values()) == set(errors.BY_REASON)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_crosses_the_wire_whole(kind: type[errors.DenoisedError]) -> None:
    error = kind("It broke.", hint="Mend it.", retry_after=1.5, metadata={"field": "prompt", "figure": "7"})
    back = arrived(error)
    assert type(back) is kind
    assert (back.message, back.hint, back.retry_after, back.metadata) == (
        error.message,
        error.hint,
        error.retry_after,
        error.metadata,
    )
    assert str(back) == str(error) == "It broke. Mend it."


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_crosses_processes_whole(kind: type[errors.DenoisedError]) -> None:
    error = kind("It broke.", hint="Mend it.", retry_after=1.5, metadata={"figure": "7"})
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert vars(back) == vars(error)
    assert str(back) == str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_a_status_code(kind: type[errors.DenoisedError]) -> None:
    data = status.to_details(kind("It broke."))
    assert status_pb2.Status.FromString(data).code == getattr(grpc.StatusCode, kind.code).value[0]
    assert arrived(kind("It broke.")).retry_after is None


def test_a_field_is_named_for_other_languages_too() -> None:
    details = status_pb2.Status.FromString(status.to_details(errors.InvalidFieldError.of("height", "is 0."))).details
    request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(request) for detail in details)
    assert request.field_violations[0].field == "height"


def test_a_status_of_somebody_else_is_still_ours_to_raise() -> None:
    assert isinstance(status.from_call(grpc.StatusCode.DEADLINE_EXCEEDED, "", ()), TimeoutError)
    assert isinstance(status.from_call(grpc.StatusCode.UNAVAILABLE, "refused", ()), errors.DaemonUnreachableError)
    too_large = status.from_call(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (9 vs. 8)", ())
    assert isinstance(too_large, errors.MessageTooLargeError)
    other = status.from_call(grpc.StatusCode.DATA_LOSS, None, None)
    assert str(other) == "DATA_LOSS: the call failed without saying why"


@pytest.mark.parametrize("data", [b"\xff\xff", status_pb2.Status(code=5, message="gone").SerializeToString()])
def test_details_of_somebody_else_are_ignored(data: bytes) -> None:
    error = status.from_call(grpc.StatusCode.NOT_FOUND, "gone", [(status.DETAILS_KEY, data)])
    assert str(error) == "NOT_FOUND: gone"


def test_a_reason_of_a_newer_daemon_is_a_plain_error() -> None:
    message = status_pb2.Status(code=5, message="New trouble.")
    message.details.add().Pack(error_details_pb2.ErrorInfo(reason="NEW_TROUBLE", domain="denoised"))
    error = status.from_call(None, "", [(status.DETAILS_KEY, message.SerializeToString())])
    assert type(error) is errors.DenoisedError
    assert str(error) == "New trouble."


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.RepoNotFoundError, EnvironmentError),
        (errors.TaskNotSupportedError, ValueError),
        (errors.InvalidFieldError, ValueError),
        (errors.PipelineNotFoundError, LookupError),
        (errors.WorkerLostError, ConnectionError),
        (errors.DeadlineExceededError, TimeoutError),
        (errors.UnsupportedError, NotImplementedError),
    ],
)
def test_callers_may_catch_what_they_know(kind: type[errors.DenoisedError], builtin: type[Exception]) -> None:
    with pytest.raises(builtin, match="It broke"):
        raise kind("It broke.")

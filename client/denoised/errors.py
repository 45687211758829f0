"""Everything that can go wrong, once for worker, daemon and clients.

    DenoisedError
    ├── InvalidRequestError (ValueError)
    │   ├── InvalidFieldError         a field is missing, out of range or of the wrong type
    │   ├── UnknownArgumentError      the pipeline takes no argument of that name
    │   ├── InvalidMediaError         an image or tensor cannot be decoded
    │   ├── InvalidNoiseSchedulerError
    │   ├── PipelineRejectedError     diffusers itself refused the arguments
    │   └── RequestKillsWorkerError   workers died whenever they ran it
    ├── PipelineError
    │   ├── AdapterNotFoundError (LookupError)    the pipeline has no adapter of that name
    │   ├── PipelineNotFoundError (LookupError)
    │   ├── PipelineExistsError
    │   └── PipelineUnloadedError     it was unloaded while it was running
    ├── GenerationError
    │   ├── GenerationNotFoundError (LookupError)
    │   └── GenerationCancelledError
    ├── GenerationInterruptedError    a callback stopped it
    ├── CallbackTimeoutError (TimeoutError)    no reply to a callback came in time
    ├── LoadError (EnvironmentError, as diffusers raises)
    │   ├── RepoNotFoundError
    │   ├── GatedRepoError
    │   ├── HubUnreachableError
    │   ├── SourceNotAllowedError
    │   ├── NotAPipelineError
    │   ├── DamagedWeightsError
    │   ├── LoadTimedOutError (TimeoutError)    the daemon's own limit, which grows with the bytes
    │   ├── WeightsChangedError       files changed since the pipeline was loaded from them
    │   ├── QuantizationUnavailableError    the backend is not installed, or does not run there
    │   └── AdapterMismatchError      the adapter does not fit the pipeline
    ├── TaskNotSupportedError (ValueError, as diffusers raises)
    ├── AccessError (PermissionError)
    │   ├── UnauthenticatedError      no token, or one that the daemon does not know
    │   ├── ScopeMissingError
    │   └── NotOwnerError             the pipeline is shared, and another client's
    ├── ResourceError
    │   ├── NeverFitsError
    │   ├── NoRoomError
    │   ├── QueueFullError
    │   ├── DeadlineUnmeetableError   too many are ahead of it
    │   ├── QuotaExceededError
    │   ├── DeviceOutOfMemoryError
    │   ├── MessageTooLargeError
    │   └── WatchLaggedError
    ├── UnavailableError (ConnectionError)
    │   ├── WorkerLostError
    │   ├── ShuttingDownError
    │   ├── WorkersDrainedError       every worker was told to take no more work
    │   ├── JournalUnavailableError   what has to last cannot be written down
    │   └── DaemonUnreachableError    raised by clients; never sent
    ├── WorkerNotFoundError (LookupError)
    ├── DeadlineExceededError (TimeoutError)
    │   └── DeadlineTooShortError     it takes longer than that, and was not begun
    ├── UnsupportedError (NotImplementedError)    raised by clients; never sent
    └── InternalError

Each class with a `reason` stands for one value of `denoised.v1.ErrorReason`, and travels as a gRPC status with
`google.rpc.ErrorInfo`; `denoised.status` translates. The names of status codes are plain text here, so that policy and
workers need no gRPC.
"""

from __future__ import annotations

from typing import ClassVar


class DenoisedError(Exception):
    """Base of all errors of denoised.

    Attributes:
        message: One sentence for people.
        hint: What to do about it; may be empty.
        retry_after: Seconds after which trying again makes sense; None where it does not.
        metadata: Figures and names for programs, all text.
    """

    code: ClassVar[str] = "UNKNOWN"
    reason: ClassVar[str] = ""

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        retry_after: float | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(f"{message} {hint}".strip())
        self.message = message
        self.hint = hint
        self.retry_after = retry_after
        self.metadata = dict(metadata or {})

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions pickle their positional arguments only; ours have to cross from the worker whole.
        return _rebuild, (type(self), self.message, self.hint, self.retry_after, self.metadata)


def _rebuild(
    kind: type[DenoisedError], message: str, hint: str, retry_after: float | None, metadata: dict[str, str]
) -> DenoisedError:
    return kind(message, hint=hint, retry_after=retry_after, metadata=metadata)


class InvalidRequestError(DenoisedError, ValueError):
    """The request cannot work as it is; sending it again does not help."""

    code = "INVALID_ARGUMENT"


class InvalidFieldError(InvalidRequestError):
    """A field is missing, out of range or of the wrong type; `metadata["field"]` names it."""

    reason = "INVALID_FIELD"

    @classmethod
    def of(cls, field: str, message: str, *, hint: str = "") -> InvalidFieldError:
        return cls(f"{field}: {message}", hint=hint, metadata={"field": field})


class UnknownArgumentError(InvalidRequestError):
    """The pipeline's `__call__` takes no argument of this name."""

    reason = "UNKNOWN_ARGUMENT"


class InvalidMediaError(InvalidRequestError):
    """An image or a tensor cannot be decoded."""

    reason = "INVALID_MEDIA"


class InvalidNoiseSchedulerError(InvalidRequestError):
    """diffusers has no noise scheduler of this class, or it cannot be configured this way."""

    reason = "INVALID_NOISE_SCHEDULER"


class PipelineRejectedError(InvalidRequestError):
    """The pipeline itself refused its arguments; the message is diffusers' own."""

    reason = "PIPELINE_REJECTED"


class RequestKillsWorkerError(InvalidRequestError):
    """Workers died whenever they ran this request; the daemon refuses it for a while."""

    code = "FAILED_PRECONDITION"
    reason = "REQUEST_KILLS_WORKER"


class PipelineError(DenoisedError):
    """Something is wrong with a handle."""


class AdapterNotFoundError(PipelineError, LookupError):
    """The pipeline has no adapter of this name."""

    code = "NOT_FOUND"
    reason = "ADAPTER_NOT_FOUND"


class PipelineNotFoundError(PipelineError, LookupError):
    """No such pipeline, or it expired."""

    code = "NOT_FOUND"
    reason = "PIPELINE_NOT_FOUND"


class PipelineExistsError(PipelineError):
    """The chosen id belongs to a pipeline with another spec."""

    code = "ALREADY_EXISTS"
    reason = "PIPELINE_EXISTS"


class PipelineUnloadedError(PipelineError):
    """The pipeline was unloaded by force while this request was running."""

    code = "ABORTED"
    reason = "PIPELINE_UNLOADED"


class GenerationError(DenoisedError):
    """Something is wrong with a generation that was asked for by its name."""


class GenerationNotFoundError(GenerationError, LookupError):
    """No such generation, or its result is not kept any more."""

    code = "NOT_FOUND"
    reason = "GENERATION_NOT_FOUND"


class GenerationCancelledError(GenerationError):
    """It was cancelled by name."""

    code = "ABORTED"
    reason = "GENERATION_CANCELLED"


class GenerationInterruptedError(DenoisedError):
    """A callback stopped the generation with `_interrupt`, and there is nothing to return."""

    code = "ABORTED"
    reason = "GENERATION_INTERRUPTED"


class LoadError(DenoisedError, EnvironmentError):
    """The weights cannot be loaded from where they were said to be."""

    # EnvironmentError would build its text from (errno, message) pairs.
    __str__ = Exception.__str__


class RepoNotFoundError(LoadError):
    """The repository, revision or directory does not exist, or may not be read."""

    code = "NOT_FOUND"
    reason = "REPO_NOT_FOUND"


class SourceNotAllowedError(LoadError):
    """The directory is outside those that the daemon may read."""

    code = "PERMISSION_DENIED"
    reason = "SOURCE_NOT_ALLOWED"


class GatedRepoError(LoadError):
    """The Hub does not give this repository to whoever the token or the daemon's login stands for."""

    code = "PERMISSION_DENIED"
    reason = "GATED_REPO"


class HubUnreachableError(LoadError):
    """The Hub cannot be reached, or broke off, and the daemon's cache does not have all of the repository."""

    code = "UNAVAILABLE"
    reason = "HUB_UNREACHABLE"


class NotAPipelineError(LoadError):
    """There is no diffusers pipeline at the source."""

    code = "FAILED_PRECONDITION"
    reason = "NOT_A_PIPELINE"


class DamagedWeightsError(LoadError):
    """A weight file is damaged or incomplete."""

    code = "FAILED_PRECONDITION"
    reason = "DAMAGED_WEIGHTS"


class LoadTimedOutError(LoadError, TimeoutError):
    """The load took longer than the daemon lets one of its size take; the metadata has how far it was."""

    code = "DEADLINE_EXCEEDED"
    reason = "LOAD_TIMED_OUT"


class WeightsChangedError(LoadError):
    """Weights that had left memory cannot be read again: their files are not what they were."""

    code = "FAILED_PRECONDITION"
    reason = "WEIGHTS_CHANGED"


class QuantizationUnavailableError(LoadError):
    """The backend that is to quantise the weights is not installed where the daemon runs, or its device lacks it."""

    code = "FAILED_PRECONDITION"
    reason = "QUANTIZATION_UNAVAILABLE"


class AdapterMismatchError(LoadError):
    """The adapter was made for weights of another shape or family, or cannot be loaded as things are."""

    code = "FAILED_PRECONDITION"
    reason = "ADAPTER_MISMATCH"


class TaskNotSupportedError(DenoisedError, ValueError):
    """diffusers maps no class of the checkpoint's family to the task."""

    code = "FAILED_PRECONDITION"
    reason = "TASK_NOT_SUPPORTED"


class AccessError(DenoisedError, PermissionError):
    """The caller is not known, or may not do this."""

    code = "PERMISSION_DENIED"
    __str__ = Exception.__str__


class UnauthenticatedError(AccessError):
    """The call came without a token that the daemon knows."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class ScopeMissingError(AccessError):
    """The token does not have the scope that the method needs; `metadata["scope"]` names it."""

    reason = "SCOPE_MISSING"


class NotOwnerError(AccessError):
    """The pipeline is shared with the caller, but only its owner may change or unload it."""

    reason = "NOT_OWNER"


class ResourceError(DenoisedError):
    """Something is not large enough, or not at the moment."""

    code = "RESOURCE_EXHAUSTED"


class NeverFitsError(ResourceError):
    """The weights are larger than any worker's budget."""

    code = "FAILED_PRECONDITION"
    reason = "NEVER_FITS"


class NoRoomError(ResourceError):
    """The weights do not fit beside those held now."""

    reason = "NO_ROOM"


class QueueFullError(ResourceError):
    """Too many requests are waiting."""

    reason = "QUEUE_FULL"


class DeadlineUnmeetableError(ResourceError):
    """So many are ahead of it that it could not be done in time; it was not begun."""

    reason = "DEADLINE_UNMEETABLE"


class QuotaExceededError(ResourceError):
    """The client has reached one of its quotas; `metadata["quota"]` names it."""

    reason = "QUOTA_EXCEEDED"


class DeviceOutOfMemoryError(ResourceError):
    """The device ran out of memory while running."""

    reason = "DEVICE_OUT_OF_MEMORY"


class MessageTooLargeError(ResourceError):
    """The message is larger than the daemon or the client takes."""

    reason = "MESSAGE_TOO_LARGE"


class WatchLaggedError(ResourceError):
    """The watcher did not keep up."""

    reason = "WATCH_LAGGED"


class UnavailableError(DenoisedError, ConnectionError):
    """Not now; trying again makes sense."""

    code = "UNAVAILABLE"
    __str__ = Exception.__str__


class WorkerLostError(UnavailableError):
    """The worker died while it had the request."""

    reason = "WORKER_LOST"


class ShuttingDownError(UnavailableError):
    """The daemon takes no new work."""

    reason = "SHUTTING_DOWN"


class WorkersDrainedError(UnavailableError):
    """Every worker has been told to take no more work."""

    reason = "WORKERS_DRAINED"


class JournalUnavailableError(UnavailableError):
    """The daemon cannot write down what has to outlive it: its journal is locked, or its disk is full."""

    reason = "JOURNAL_UNAVAILABLE"


class DaemonUnreachableError(UnavailableError):
    """No daemon answers at the target. Raised by clients."""


class CallbackTimeoutError(DenoisedError, TimeoutError):
    """A callback was asked, and its caller did not reply in time."""

    code = "DEADLINE_EXCEEDED"
    reason = "CALLBACK_TIMEOUT"
    __str__ = Exception.__str__


class WorkerNotFoundError(DenoisedError, LookupError):
    """There is no worker of this name."""

    code = "NOT_FOUND"
    reason = "WORKER_NOT_FOUND"


class DeadlineExceededError(DenoisedError, TimeoutError):
    """The caller's deadline passed."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"
    __str__ = Exception.__str__


class DeadlineTooShortError(DeadlineExceededError):
    """It takes longer than what is left until the deadline, even with nobody ahead of it; it was not begun."""

    reason = "DEADLINE_TOO_SHORT"


class UnsupportedError(DenoisedError, NotImplementedError):
    """diffusers can do this in one process, but it cannot cross the wire. Raised by clients."""

    code = "UNIMPLEMENTED"


class InternalError(DenoisedError):
    """A bug in the daemon; its log has the rest under the request id."""

    code = "INTERNAL"
    reason = "INTERNAL"


def _by_reason(kind: type[DenoisedError]) -> dict[str, type[DenoisedError]]:
    found = {kind.reason: kind} if kind.reason else {}
    for child in kind.__subclasses__():
        found |= _by_reason(child)
    return found


BY_REASON = _by_reason(DenoisedError)

"""Who may call which method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from denoised.errors import ScopeMissingError, UnauthenticatedError

from . import tokens
from .callers import DAEMON, Caller, Scope
from .tokens import Token

AUTHORIZATION = "authorization"
BEARER = "bearer "
COMMON_NAME = "x509_common_name"

# Every method there is: one that is missing may only be called by an admin.
SCOPES: Mapping[str, Scope] = {
    "/denoised.v1.PipelineService/LoadPipeline": Scope.LOAD,
    "/denoised.v1.PipelineService/PlanPipeline": Scope.LOAD,
    "/denoised.v1.PipelineService/DerivePipeline": Scope.LOAD,
    "/denoised.v1.PipelineService/UpdatePipeline": Scope.LOAD,
    "/denoised.v1.PipelineService/RenewPipeline": Scope.LOAD,
    "/denoised.v1.PipelineService/UnloadPipeline": Scope.LOAD,
    "/denoised.v1.PipelineService/GetPipeline": Scope.READ,
    "/denoised.v1.PipelineService/ListPipelines": Scope.READ,
    "/denoised.v1.PipelineService/WatchPipelines": Scope.READ,
    "/denoised.v1.GenerationService/Generate": Scope.GENERATE,
    "/denoised.v1.GenerationService/GenerateInteractively": Scope.GENERATE,
    "/denoised.v1.GenerationService/EncodePrompt": Scope.GENERATE,
    "/denoised.v1.GenerationService/ResumeGeneration": Scope.GENERATE,
    "/denoised.v1.GenerationService/CancelGeneration": Scope.GENERATE,
    "/denoised.v1.GenerationService/GetGeneration": Scope.READ,
    "/denoised.v1.GenerationService/ListGenerations": Scope.READ,
    "/denoised.v1.WorkerService/ListWorkers": Scope.READ,
    "/denoised.v1.WorkerService/WatchWorkers": Scope.READ,
    "/denoised.v1.WorkerService/GetServerInfo": Scope.READ,
    "/denoised.v1.WorkerService/DrainWorker": Scope.ADMIN,
    "/denoised.v1.WorkerService/ResumeWorker": Scope.ADMIN,
}


class Access:
    """Tells who calls from what came with a call. Without tokens to check, everybody may do everything."""

    def __init__(self, known: Callable[[], Sequence[Token]] | None = None) -> None:
        self._known = known

    def admit(
        self,
        method: str,
        metadata: Iterable[tuple[str, str | bytes]],
        identity: Mapping[str, Iterable[bytes]],
    ) -> Caller:
        """Raises UnauthenticatedError and ScopeMissingError. `identity` is gRPC's word on the client's certificate."""
        if self._known is None:
            return DAEMON
        caller = _identify(self._known(), metadata, identity)
        scope = SCOPES.get(method, Scope.ADMIN)
        if not caller.may(scope):
            raise ScopeMissingError(
                f"{method.rpartition('/')[2]} needs the scope {scope}, which this token does not have.",
                hint="Ask whoever runs the daemon for a token with this scope.",
                metadata={"scope": scope},
            )
        return caller


def _identify(
    known: Sequence[Token], metadata: Iterable[tuple[str, str | bytes]], identity: Mapping[str, Iterable[bytes]]
) -> Caller:
    shown = [value for key, value in metadata if key == AUTHORIZATION and isinstance(value, str)]
    if shown:
        # The last one is the client's own where a proxy before us has added to it; more than one is an attempt.
        secret = shown[0][len(BEARER) :] if shown[0].lower().startswith(BEARER) else ""
        if len(shown) == 1 and (token := tokens.find(known, secret)) is not None:
            return token.caller
        raise UnauthenticatedError(
            "The token is not known; it may have been revoked.", hint="Check DENOISED_TOKEN or `token=`."
        )
    for name in identity.get(COMMON_NAME, ()):
        if (token := tokens.find_certificate(known, name.decode(errors="replace"))) is not None:
            return token.caller
    raise UnauthenticatedError(
        "The daemon asks for a token, and the call came without one.", hint="Set DENOISED_TOKEN or `token=`."
    )

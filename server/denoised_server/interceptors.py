"""Around every call: who may make it, a request id, a count by outcome, and errors as statuses for clients."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any, TypeAlias, cast

import grpc
from denoised import traces
from denoised.errors import DenoisedError, InternalError, InvalidFieldError, MessageTooLargeError
from denoised.status import DETAILS_KEY, to_details
from google.protobuf.message import DecodeError

from . import audit, callers, request_context
from .access import SCOPES, Access
from .audit import Audit
from .callers import Scope
from .observer import Observer
from .quotas import Quotas

logger = logging.getLogger(__name__)

OURS = "/denoised."
# Dashboards call these every second.
LOOKING = ("Get", "List", "Watch")
PUSHBACK_KEY = "grpc-retry-pushback-ms"
# gRPC carries a status in headers, of which peers take 8 KiB. It holds our text up to three times.
MAX_TEXT_BYTES = 800

# In place of a request that is no message.
UNREADABLE = object()

# Only the stubs know that it is generic.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Lets in who may call, and translates a DenoisedError to its status; everything else is a bug, and says so.

    A handler may thus be written as if nothing could fail, and asks `callers.current()` for whom it works.
    """

    def __init__(self, *, access: Access, max_message_bytes: int, observer: Observer, log: Audit | None = None) -> None:
        self._access = access
        self._audit = log or Audit()
        self._quotas = Quotas()
        self._max_message_bytes = max_message_bytes
        self._observer = observer

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler: Any = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(OURS):
            return cast("Handler | None", handler)
        codec = {
            "request_deserializer": partial(_parse, handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        if handler.request_streaming:
            talk = handler.stream_stream

            async def answer_messages(messages: Any, context: Any) -> AsyncIterator[Any]:
                messages = self._sized(messages)
                async with self._watched(method, None, context), aclosing(talk(messages, context)) as responses:
                    async for response in responses:
                        yield response

            return grpc.stream_stream_rpc_method_handler(answer_messages, **codec)
        if handler.response_streaming:
            stream = handler.unary_stream

            async def answer_stream(request: Any, context: Any) -> AsyncIterator[Any]:
                async with (
                    self._watched(method, request, context) as facts,
                    aclosing(stream(request, context)) as responses,
                ):
                    async for response in responses:
                        facts |= audit.facts_of(response)
                        yield response

            return grpc.unary_stream_rpc_method_handler(answer_stream, **codec)
        unary = handler.unary_unary

        async def answer(request: Any, context: Any) -> Any:
            async with self._watched(method, request, context) as facts:
                response = await unary(request, context)
                facts |= audit.facts_of(response)
                return response

        return grpc.unary_unary_rpc_method_handler(answer, **codec)

    @asynccontextmanager
    async def _watched(self, method: str, request: Any, context: Any) -> AsyncGenerator[dict[str, object], None]:
        """Yields what the audit log is told of the call, for more to be added."""
        name, request_id = method.rsplit("/", 1)[-1], secrets.token_hex(8)
        began, outcome = time.monotonic(), "cancelled"
        request_context.begin(request_id)
        # Now: of a call whose connection has closed meanwhile, gRPC ends the process when it is asked for this.
        peer = context.peer()
        facts: dict[str, object] = {}
        try:
            caller = self._access.admit(method, context.invocation_metadata() or (), context.auth_context())
            callers.act_for(caller)
            facts["client"] = caller.name
            if not name.startswith(LOOKING):
                self._quotas.count_request(caller, began)
            if request is not None:
                self._check_size(request)
                facts |= audit.facts_of(request, prompts=self._audit.prompts)
            with traces.serving(name, context.invocation_metadata() or ()):
                yield facts
            outcome = "ok"
        except DenoisedError as error:
            # What breaks because the caller left is no error, and nobody is told of it.
            outcome = "cancelled" if context.cancelled() else error.reason.lower() or "internal"
            await _abort(context, error, request_id)
        except Exception:
            outcome = "internal"
            logger.exception("request %s: %s failed in a way it should not", request_id, name)
            bug = InternalError("The daemon failed in a way it should not.", hint="Its log has the rest.")
            await _abort(context, bug, request_id)
        except (asyncio.CancelledError, GeneratorExit):
            if (left := context.time_remaining()) is not None and left <= 0:
                outcome = "deadline_exceeded"
            raise
        finally:
            seconds = time.monotonic() - began
            self._observer.request_ended(name, outcome, seconds)
            level = logging.DEBUG if name.startswith(LOOKING) else logging.INFO
            logger.log(level, "%s %s after %.3f s", name, outcome, seconds)
            if self._is_audited(method, outcome):
                told = {"outcome": outcome, "peer": peer, "request_id": request_id}
                self._audit.record(name, facts | told)

    def _is_audited(self, method: str, outcome: str) -> bool:
        scope = SCOPES.get(method, Scope.ADMIN)
        has_prompt = scope is Scope.GENERATE and self._audit.prompts
        return scope in (Scope.LOAD, Scope.ADMIN) or has_prompt or outcome in audit.REFUSALS

    async def _sized(self, messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for message in messages:
            self._check_size(message)
            yield message

    def _check_size(self, request: Any) -> None:
        if request is UNREADABLE:
            raise InvalidFieldError.of(
                "request", "it is no message of this method's.", hint="Use a client made from the protos."
            )
        if (size := request.ByteSize()) > self._max_message_bytes:
            raise MessageTooLargeError(
                f"The request takes {size:,} bytes and the daemon takes at most {self._max_message_bytes:,}.",
                hint="Send smaller or fewer images, or raise the daemon's setting max_message_bytes.",
            )


def _parse(parse: Callable[[bytes], Any], data: bytes) -> Any:
    """gRPC itself would answer what cannot be parsed with UNKNOWN, and log it as an error of ours."""
    try:
        return parse(data)
    except DecodeError:
        return UNREADABLE


async def _abort(context: Any, error: DenoisedError, request_id: str) -> None:
    sent = type(error)(
        _cut(error.message),
        hint=_cut(error.hint),
        retry_after=error.retry_after,
        metadata={key: _cut(value) for key, value in error.metadata.items()} | {"request_id": request_id},
    )
    code = getattr(grpc.StatusCode, sent.code)
    trailing: list[tuple[str, str | bytes]] = [(DETAILS_KEY, to_details(sent))]
    if sent.retry_after is not None:
        # What a channel's retry policy heeds, as RetryInfo is for programs.
        trailing.append((PUSHBACK_KEY, str(round(sent.retry_after * 1000))))
    await context.abort(code, str(sent), tuple(trailing))


def _cut(text: str) -> str:
    data = text.encode()
    return text if len(data) <= MAX_TEXT_BYTES else data[:MAX_TEXT_BYTES].decode(errors="ignore") + " …"

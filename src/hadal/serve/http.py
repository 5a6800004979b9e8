"""What every route shares: bodies, errors, streams of events, clients that go away."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, Final, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

from hadal.errors import (
    CapacityError,
    ConfigError,
    ContextLengthError,
    EncodingError,
    HadalError,
    InputError,
    InvalidConversationError,
    UpstreamError,
)

__all__ = [
    "ClientGoneError",
    "HttpError",
    "anthropic_error",
    "comment",
    "data",
    "error_response",
    "event_stream",
    "named",
    "new_id",
    "now",
    "openai_error",
    "read_body",
    "started",
    "status_of",
    "until_gone",
    "with_pings",
]

T = TypeVar("T")

_STATUS: Final[tuple[tuple[type[HadalError], int], ...]] = (
    (CapacityError, 429),
    (UpstreamError, 502),
    (ContextLengthError, 400),
    (EncodingError, 400),
    (InputError, 400),
    (ConfigError, 400),
)
_ANTHROPIC_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class HttpError(HadalError):
    """A fault of HTTP itself: a wrong key, a body that is too large, an unknown model."""

    code = "http"

    def __init__(self, status: int, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class ClientGoneError(Exception):
    """The client closed the connection."""


def status_of(err: HadalError) -> int:
    """Return the HTTP status of an error."""
    if isinstance(err, HttpError):
        return err.status
    return next((status for kind, status in _STATUS if isinstance(err, kind)), 500)


def _code(err: HadalError) -> str:
    return "context_length_exceeded" if isinstance(err, ContextLengthError) else err.code


def openai_error(err: HadalError) -> dict[str, Any]:
    """Return an error as the OpenAI APIs write it."""
    status = status_of(err)
    kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
    kind = kinds.get(status, "rate_limit_error" if status == 429 else "server_error")
    if 404 < status < 429:
        kind = "invalid_request_error"
    where = err.where if isinstance(err, InvalidConversationError) else None
    return {
        "error": {"message": str(err), "type": kind, "param": where or None, "code": _code(err)}
    }


def anthropic_error(err: HadalError) -> dict[str, Any]:
    """Return an error as the Anthropic API writes it."""
    kind = _ANTHROPIC_TYPES.get(status_of(err), "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(err)}}


def error_response(err: HadalError, *, anthropic: bool) -> JSONResponse:
    """Return the response to a request that failed."""
    body = anthropic_error(err) if anthropic else openai_error(err)
    status = status_of(err)
    headers = {"retry-after": "1"} if status in (429, 503) else None
    return JSONResponse(body, status, headers)


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body.

    Raises:
        HttpError: It is larger than allowed.
    """
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise HttpError(
                413,
                f"the body is too large: expected at most {limit:,} bytes",
                hint="start the server with a larger --max-body",
            )
        parts.append(part)
    return b"".join(parts)


def new_id(prefix: str) -> str:
    """Return a random id."""
    return f"{prefix}{secrets.token_hex(12)}"


def now() -> int:
    """Return the time in seconds."""
    return int(time.time())


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run something for a client; stop it when the client goes away.

    Raises:
        ClientGoneError: It did.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for job in (task, watcher):
            job.cancel()
            with suppress(asyncio.CancelledError, HadalError):
                await job


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def with_pings(items: AsyncGenerator[T], every_s: float) -> AsyncGenerator[T | None]:
    """Pass items on, and None when there was none for a while."""
    pending: asyncio.Future[T] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(items))
            done, _ = await asyncio.wait({pending}, timeout=every_s)
            if not done:
                yield None
                continue
            finished, pending = pending, None
            try:
                item = finished.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        if pending is not None:
            pending.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration, HadalError):
                await pending
        await items.aclose()


def event_stream(
    events: AsyncGenerator[str], headers: dict[str, str] | None = None
) -> StreamingResponse:
    """Return a response of server-sent events that are already written out."""
    fixed = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(
        events, media_type="text/event-stream", headers=fixed | (headers or {})
    )


def data(value: Any) -> str:
    """Return an event without a name."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def named(event: dict[str, Any]) -> str:
    """Return an event named by its type, as the Responses and Anthropic APIs write them."""
    return f"event: {event['type']}\n{data(event)}"


def comment(text: str) -> str:
    """Return a line that clients skip: it keeps the connection open."""
    return f": {text}\n\n"


async def started(items: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """Wait for the first item, so that an error before it can still have its own status."""
    first = await anext(items, None)

    async def all_of_them() -> AsyncGenerator[T]:
        async with aclosing(items):
            if first is not None:
                yield first
            async for item in items:
                yield item

    return all_of_them()

"""The server: routes, keys, limits, draining. Plain ASGI, so that any server of it will do."""

import hashlib
import hmac
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hadal import __version__
from hadal.errors import CapacityError, HadalError
from hadal.serve.chat_api import ChatApi
from hadal.serve.http import ClientGoneError, HttpError, error_response, now, read_body
from hadal.serve.messages_api import MessagesApi
from hadal.serve.metrics import MeteredBackend
from hadal.serve.openapi import document
from hadal.serve.responses_api import ResponsesApi
from hadal.serve.tokens_api import TokensApi
from hadal.serve.turn import Front

__all__ = ["ServerConfig", "build_app"]

_LOG = logging.getLogger("hadal.serve")

Handler = Callable[[Request, bytes, str], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Limits and keys of a server.

    Attributes:
        api_keys: Keys that are let in; none: everybody.
        max_body_bytes: Largest request.
        max_concurrent: Requests at a time; more get 429.
        ping_s: Seconds of silence after which a comment keeps a stream open.
    """

    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 64 << 20
    max_concurrent: int = 1024
    ping_s: float = 10.0


class _Server:
    def __init__(self, front: Front, config: ServerConfig) -> None:
        self.front = front
        self.config = config
        self.metered = MeteredBackend(front.backend, front.model)
        front.backend = self.metered
        self.draining = False
        self._digests = [_digest(key) for key in config.api_keys]

    def scope_of(self, request: Request) -> str:
        """Check the key; return whose request it is, for what is remembered between requests."""
        if not self._digests:
            return ""
        given = request.headers.get("x-api-key", "")
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given = token.strip()
        own = _digest(given)
        if not any([hmac.compare_digest(own, known) for known in self._digests]):  # noqa: C419 - all
            raise HttpError(
                401, "the API key is missing or wrong", hint="Authorization: Bearer KEY"
            )
        return own.hex()[:16]

    def route(self, handler: Handler, *, anthropic: bool = False) -> Callable[..., object]:
        """Return an endpoint around a handler: key, limits, body, errors."""

        async def endpoint(request: Request) -> Response:
            try:
                scope = self.scope_of(request)
                if self.draining:
                    raise HttpError(503, "the server is shutting down", hint="ask another one")
                if self.metered.open >= self.config.max_concurrent:
                    raise CapacityError(
                        f"{self.metered.open} requests are being served", hint="try again later"
                    )
                body = await read_body(request, self.config.max_body_bytes)
                return await handler(request, body, scope)
            except HadalError as err:
                return error_response(err, anthropic=anthropic)
            except ExceptionGroup as group:  # of choices that ran together
                found, _ = group.split(HadalError)
                if found is None:
                    raise
                first = found.exceptions[0]
                assert isinstance(first, HadalError)
                return error_response(first, anthropic=anthropic)
            except ClientGoneError:
                return Response(status_code=499)

        return endpoint


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).digest()


def _plain_routes(server: _Server) -> list[Route]:
    """Return the routes that need no key and answer while the server drains."""

    async def health(request: Request) -> Response:
        well = server.metered.healthy() and not server.draining
        return JSONResponse({"status": "ok" if well else "unavailable"}, 200 if well else 503)

    async def alive(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def version(request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def metrics(request: Request) -> Response:
        return Response(server.metered.exposition(), media_type="text/plain; version=0.0.4")

    async def openapi(request: Request) -> Response:
        return JSONResponse(described)

    described = document()
    handlers = {
        "/openapi.json": openapi,
        "/health": health,
        "/readyz": health,
        "/livez": alive,
        "/version": version,
        "/metrics": metrics,
    }
    return [Route(path, handler, methods=["GET"]) for path, handler in handlers.items()]


def build_app(front: Front, config: ServerConfig | None = None) -> Starlette:
    """Return the server as an ASGI application; `app.state.server.draining` stops new requests."""
    config = config or ServerConfig()
    server = _Server(front, config)
    chat, messages = ChatApi(front, ping_s=config.ping_s), MessagesApi(front, ping_s=config.ping_s)
    responses = ResponsesApi(front, ping_s=config.ping_s)
    tokens = TokensApi(front, ping_s=config.ping_s)

    async def count(request: Request, body: bytes, scope: str) -> Response:
        return await messages.count(body, scope)

    async def tokenize(request: Request, body: bytes, scope: str) -> Response:
        return tokens.tokenize(body, scope)

    async def detokenize(request: Request, body: bytes, scope: str) -> Response:
        return tokens.detokenize(body)

    async def models(request: Request, body: bytes, scope: str) -> Response:
        model = {
            "id": front.model,
            "object": "model",
            "created": started,
            "owned_by": "hadal",
            "max_model_len": front.backend.max_model_len,
        }
        return JSONResponse({"object": "list", "data": [model]})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        yield
        server.draining = True
        await server.metered.close()

    started = now()
    posts: list[tuple[str, Handler, bool]] = [
        ("/v1/chat/completions", chat.respond, False),
        ("/v1/completions", tokens.complete, False),
        ("/v1/responses", responses.respond, False),
        ("/v1/messages", messages.respond, True),
        ("/v1/messages/count_tokens", count, True),
        ("/inference/v1/generate", tokens.generate, False),
        ("/tokenize", tokenize, False),
        ("/detokenize", detokenize, False),
    ]
    routes = [
        Route(path, server.route(handler, anthropic=anthropic), methods=["POST"])
        for path, handler, anthropic in posts
    ]
    routes.append(Route("/v1/models", server.route(models), methods=["GET"]))
    routes += _plain_routes(server)
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_exception, Exception: _unexpected},
    )
    app.state.server = server
    return app


async def _http_exception(request: Request, err: Exception) -> Response:
    assert isinstance(err, HTTPException)
    where = f"{request.method} {request.url.path}"
    anthropic = request.url.path.startswith("/v1/messages")
    fault = HttpError(err.status_code, f"{where}: {err.detail}")
    reply = error_response(fault, anthropic=anthropic)
    reply.headers.update(err.headers or {})  # 405 has to say what is allowed
    return reply


async def _unexpected(request: Request, err: Exception) -> Response:
    _LOG.exception("%s %s failed", request.method, request.url.path, exc_info=err)
    fault = HttpError(500, "the server failed; its log says how")
    return error_response(fault, anthropic=request.url.path.startswith("/v1/messages"))

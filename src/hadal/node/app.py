"""The node over HTTP: what docs/formats/node-api.md describes, on a Unix socket or a port."""

import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from hadal.errors import ConfigError, HadalError, NodeAuthError
from hadal.node.node import Node
from hadal.node.routes import boxes, commands, daemon, files, ports
from hadal.node.routes.http import NODE, STOP, error_body, error_status

__all__ = ["build_node_app"]

logger = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except HadalError as error:
        return web.json_response(error_body(error), status=error_status(error))
    except web.HTTPException as error:
        if error.status < 400:
            raise
        body = error_body(ConfigError(f"{request.method} {request.path}: {error.reason}"))
        return web.json_response(body, status=error.status)
    except (RecursionError, UnicodeError) as error:
        body = error_body(
            ConfigError(f"a request that is nested too deep or no text: {error!r:.200}")
        )
        return web.json_response(body, status=400)
    except Exception as error:
        if isinstance(error, ConnectionError) and _has_left(request):
            logger.info("client has left", extra={"method": request.method, "path": request.path})
            return web.Response()  # for nobody
        logger.exception("request failed", extra={"method": request.method, "path": request.path})
        body = {
            "code": "node",
            "message": "the node failed; its log says how",
            "hint": None,
            "details": {},
        }
        return web.json_response(body, status=500)


def _has_left(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


def _authorize(keys: frozenset[str]) -> Any:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = (
            request.headers.get("Authorization", "")
            .removeprefix("Bearer ")
            .encode(errors="replace")
        )
        if request.path != "/healthz" and not any(
            hmac.compare_digest(given, k.encode()) for k in keys
        ):
            raise NodeAuthError(
                "the node does not know this API key", hint="set HADAL_NODE_KEY, or pass key="
            )
        return await handler(request)

    return check


def build_node_app(
    node: Node,
    *,
    keys: frozenset[str] = frozenset(),
    stop: Callable[[bool], None] | None = None,
) -> web.Application:
    """Return the application of a node.

    Args:
        node: The node.
        keys: API keys, of which every request needs one; none for none.
        stop: Ends the daemon, with or without its boxes; None where callers may not.
    """
    middlewares = [_errors, _authorize(keys)] if keys else [_errors]
    app = web.Application(middlewares=middlewares, client_max_size=64 << 20)
    app[NODE] = node
    app[STOP] = stop
    for module in (boxes, commands, daemon, files, ports):
        app.add_routes(module.routes)
    return app

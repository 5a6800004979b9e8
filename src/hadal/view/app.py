"""The page over HTTP, on this machine only unless told otherwise."""

import json
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from hadal.agent.run_files import RunFiles
from hadal.errors import ConfigError, StorageError
from hadal.view.single_page import page_file, single_page

__all__ = ["build_app"]

_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_HEADERS = {
    "content-security-policy": "default-src 'self'; style-src 'self'; script-src 'self'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def build_app(files: RunFiles) -> Starlette:
    """Return the application.

    Args:
        files: The runs to show.
    """

    def page(request: Request) -> Response:
        name = request.path_params.get("name") or "index.html"
        kind = _KINDS.get(name.rpartition(".")[2])
        if kind is None or "/" in name:
            raise HTTPException(404)
        try:
            return Response(page_file(name), media_type=kind, headers=_HEADERS)
        except FileNotFoundError:
            raise HTTPException(404) from None

    def list_runs(_: Request) -> Response:
        return _json(files.rows())

    def one_run(request: Request) -> Response:
        tag = _tag(files, request)
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"etag": tag})
        return _json(_whole(files, request), etag=tag)

    def tokens(request: Request) -> Response:
        run, step = request.path_params["run"], request.path_params["step"]
        return _json(_found(lambda: files.tokens(run, step)))

    def export(request: Request) -> Response:
        return HTMLResponse(single_page(_whole(files, request)))

    return Starlette(
        routes=[
            Route("/api/runs", list_runs),
            Route("/api/runs/{run}", one_run),
            Route("/api/runs/{run}/tokens/{step:int}", tokens),
            Route("/export/{run}.html", export),
            Route("/{name:path}", page),
        ],
        middleware=[
            Middleware(GZipMiddleware, minimum_size=1000),
        ],
    )


def _json(said: Any, **headers: str) -> Response:
    """Return JSON in ASCII: a name of a file in a box may hold bytes that are no UTF-8."""
    return Response(json.dumps(said), media_type="application/json", headers=_HEADERS | headers)


def _tag(files: RunFiles, request: Request) -> str:
    """Return what changes whenever the run does; taken before it is read, so that nothing is missed."""
    try:
        version = files.version(request.path_params["run"])
    except ConfigError as error:
        raise HTTPException(404, error.message) from error
    return f'W/"{"-".join(map(str, map(int, version)))}"'


def _whole(files: RunFiles, request: Request) -> dict[str, Any]:
    return _found(lambda: files.whole(request.path_params["run"]))


def _found(read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return read()
    except ConfigError as error:
        raise HTTPException(404, error.message) from error
    except StorageError as error:
        raise HTTPException(500, error.message) from error

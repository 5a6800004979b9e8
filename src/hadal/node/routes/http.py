"""What every route of the node shares: the node, what a request says, errors as JSON."""

import json
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from aiohttp import web
from pydantic import BaseModel, ValidationError

from hadal.errors import (
    CommandRefusedError,
    ConfigError,
    HadalError,
    ImageError,
    NoCapacityError,
    NodeAuthError,
    SandboxFileError,
    SandboxGoneError,
    UnknownOutcomeError,
    UnsupportedError,
)
from hadal.node.box import Box
from hadal.node.node import Node
from hadal.sandbox.client import ERROR_DETAILS

__all__ = [
    "NODE",
    "STOP",
    "box_of",
    "error_body",
    "error_status",
    "number",
    "parameters",
    "query",
    "read_body",
]

NODE = web.AppKey("node", Node)
STOP: web.AppKey[Callable[[bool], None] | None] = web.AppKey("stop")
_STATUS: list[tuple[type[HadalError], int]] = [
    (NodeAuthError, 401),
    (SandboxGoneError, 410),
    (NoCapacityError, 503),
    (SandboxFileError, 422),
    (CommandRefusedError, 422),
    (UnknownOutcomeError, 409),
    (ImageError, 422),
    (UnsupportedError, 501),
    (ConfigError, 400),
]
Body = TypeVar("Body", bound=BaseModel)


def error_body(error: HadalError) -> dict[str, Any]:
    """Return an error as JSON, from which the SDK makes it again."""
    values = {name: getattr(error, name, None) for name in ERROR_DETAILS}
    details = {name: value for name, value in values.items() if value is not None}
    return {"code": error.code, "message": error.message, "hint": error.hint, "details": details}


def error_status(error: HadalError) -> int:
    """Return the status that an error has."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


async def read_body(request: web.Request, kind: type[Body]) -> Body:
    """Return what a request says.

    Raises:
        ConfigError: It says something else.
    """
    try:
        return kind.model_validate(json.loads(await request.read()))
    except (ValueError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise ConfigError(f"{request.path}: the body is no JSON: {error}") from error
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{request.path}: {where}: {first['msg']}, got {first['input']!r:.500}"
        ) from error


def box_of(request: web.Request) -> Box:
    """Return the box that the path names."""
    return request.app[NODE].get(request.match_info["box"])


def parameters(request: web.Request) -> dict[str, str]:
    """Return the query. Names of files are bytes: what is not UTF-8 comes through as it is."""
    raw = request.rel_url.raw_query_string
    return dict(parse_qsl(raw, keep_blank_values=True, errors="surrogateescape"))


def query(request: web.Request, name: str) -> str:
    """Return a parameter that must be there.

    Raises:
        ConfigError: It is not.
    """
    value = parameters(request).get(name)
    if value is None:
        raise ConfigError(f"{request.path}: the query has no {name}")
    return value


def number(request: web.Request, name: str, default: int) -> int:
    """Return a parameter that is a number from 0 on.

    Raises:
        ConfigError: It is none.
    """
    text = request.query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ConfigError(f"{request.path}: {name} must be a number from 0 on, got {text!r:.100}")
    return int(text)

"""Functions as the node takes them, and their results."""

import ast
import base64
import inspect
import json
import pickle
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hadal.errors import ConfigError
from hadal.sandbox.results import CallResult

__all__ = ["call_body", "read_call"]


def call_body(
    function: Callable[..., object] | str,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    pickled: bool,
) -> dict[str, Any]:
    """Return a call as JSON.

    Raises:
        ConfigError: There is no function in it, or the arguments cannot be sent.
    """
    source = function if isinstance(function, str) else _source_of(function)
    arguments: Any = [list(args), dict(kwargs)]
    try:
        if pickled:
            arguments = base64.b64encode(pickle.dumps(arguments)).decode()
        else:
            json.dumps(arguments)
    except (TypeError, ValueError, pickle.PicklingError) as error:
        raise ConfigError(
            f"arguments cannot be sent: {error}",
            hint="use what JSON knows, or pickled=True" if not pickled else None,
        ) from error
    return {
        "source": source,
        "name": _last_function(source),
        "arguments": arguments,
        "pickled": pickled,
    }


def _source_of(function: Callable[..., object]) -> str:
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError) as error:
        raise ConfigError(
            f"{function!r} has no source that can be sent: {error}", hint="pass the source as text"
        ) from error


def _last_function(source: str) -> str:
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ConfigError(f"the source of a call cannot be parsed: {error}") from error
    names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    if not names:
        raise ConfigError("a call needs a function: the source defines none", hint="def f(): …")
    return names[-1]


def read_call(body: Mapping[str, Any]) -> CallResult:
    """Read a result. A pickle stays one."""
    packed = body.get("pickle")
    return CallResult(
        returned=body.get("value"),
        pickle=None if packed is None else base64.b64decode(packed),
        error=body.get("error"),
        message=body.get("message", ""),
        trace=body.get("trace", ""),
        stdout_bytes=base64.b64decode(body.get("stdout", "")),
        stderr_bytes=base64.b64decode(body.get("stderr", "")),
        timed_out=body.get("timed_out", False),
        duration_s=body.get("duration_s", 0.0),
        recorded=body.get("recorded", False),
    )

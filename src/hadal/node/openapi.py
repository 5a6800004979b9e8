"""The node's OpenAPI document, made from the types that the routes check (`hadal.sandbox.protocol`)."""

from dataclasses import dataclass
from typing import Any, Final, cast

from pydantic import BaseModel, TypeAdapter

from hadal import __version__
from hadal.sandbox.protocol import (
    CallRequest,
    CommandRequest,
    CreateRequest,
    ErrorBody,
    FileChange,
    InputRequest,
    NetworkRequest,
    PauseRequest,
    SignalRequest,
    SnapshotRequest,
    StopRequest,
)
from hadal.sandbox.results import (
    BoxInfo,
    CallResult,
    Change,
    Event,
    ExecResult,
    FileStat,
    NodeStatus,
    Usage,
)
from hadal.sandbox.specs import ContainerSpec, FunctionSpec, MicroVMSpec, VMSpec

__all__ = ["document"]

Schema = dict[str, Any]

_TEXT: Final[Schema] = {"type": "string"}
_NUMBER: Final[Schema] = {"type": "integer", "minimum": 0}
_BASE64: Final[Schema] = {"type": "string", "contentEncoding": "base64"}
_TYPES: Final = (BoxInfo, CallResult, Change, Event, ExecResult, FileStat, NodeStatus, Usage)
_BODIES: Final = (
    CallRequest, CommandRequest, CreateRequest, FileChange, InputRequest, NetworkRequest, PauseRequest, SignalRequest,
    SnapshotRequest, StopRequest, ErrorBody, ContainerSpec, FunctionSpec, MicroVMSpec, VMSpec,
)  # fmt: skip
_ERRORS: Final = {
    "400": "The request is wrong; the message says where",
    "401": "The API key is missing or wrong",
    "409": "Whether a recorded command was done is not known",
    "410": "The box is gone, and why",
    "422": "The box or the system refused it: no such file, program or image",
    "500": "The node failed: a full disk, a box that could not be made",
    "501": "This node cannot do that",
    "503": "The node is full",
}


@dataclass(frozen=True)
class _Route:
    """One operation.

    Attributes:
        method, path: As the router has them, without the patterns.
        summary: For people.
        body: What it takes as JSON, or "bytes".
        query: Its parameters; those that end with `!` are required.
        answer: Its JSON, or "bytes" or "text" or "websocket".
        status: Of success.
    """

    method: str
    path: str
    summary: str
    body: type[BaseModel] | str | None = None
    query: tuple[str, ...] = ()
    answer: Schema | str | None = None
    status: str = "200"


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item}


_BOX: Final = "/v1/boxes/{box}"
_COMMAND: Final = _BOX + "/commands/{command}"
_BOXES: Final = _object(boxes=_list(_ref("BoxInfo")))
_LOGGED: Final = {
    "allOf": [_ref("Event"), _object(request_id=_TEXT, stdout=_BASE64, stderr=_BASE64)]
}
_READ: Final = {"oneOf": [_ref("FileStat"), _object(entries=_list(_ref("FileStat")))]}
_RAN: Final = {"oneOf": [_ref("ExecResult"), _object(id=_NUMBER)]}
_ROUTES: Final = (
    _Route("post", "/v1/boxes", "Make a box", CreateRequest, answer=_ref("BoxInfo"), status="201"),
    _Route("get", "/v1/boxes", "The living boxes", answer=_BOXES),
    _Route("get", _BOX, "What is known of a box, living or gone", answer=_ref("BoxInfo")),
    _Route("delete", _BOX, "End a box", answer=_object(ended={"type": "boolean"})),
    _Route(
        "get", _BOX + "/log", "What was done in it, behind a position", query=("after", "limit"),
        answer=_object(records=_list(_LOGGED)),
    ),
    _Route("get", _BOX + "/usage", "What it uses", answer=_ref("Usage")),
    _Route(
        "get", _BOX + "/changes", "What differs from its image", query=("content", "limit"),
        answer=_object(changes=_list(_ref("Change"))),
    ),
    _Route(
        "get", _BOX + "/ports/{port}", "Connect to a port in it, over a WebSocket",
        answer="websocket",
    ),
    _Route("post", _BOX + "/call", "Call a function", CallRequest, answer={"type": "object"}),
    _Route("post", _BOX + "/fork", "Make boxes with its files", SnapshotRequest, answer=_BOXES),
    _Route(
        "post", _BOX + "/snapshot", "Keep its files as an image, or all of a machine", SnapshotRequest,
        answer=_object(reference=_TEXT),
    ),
    _Route(
        "get", "/v1/machines/kept", "Snapshots of machines with their memory",
        answer=_object(machines=_list({"type": "object"})),
    ),
    _Route("delete", "/v1/machines/kept/{reference}", "Remove such a snapshot", answer=_object()),
    _Route("put", _BOX + "/network", "Change what it may reach", NetworkRequest, answer=_object()),
    _Route(
        "get", _BOX + "/network", "What it sent, received and was denied", answer={"type": "object"}
    ),
    _Route("get", _BOX + "/screenshot", "What is on its screen", answer="image"),
    _Route("get", _BOX + "/console", "The end of what it said on its serial console", answer="bytes"),
    _Route("post", _BOX + "/input", "Type, press keys, or click", InputRequest, answer=_object()),
    _Route(
        "post", _BOX + "/pause", "Stop its processes, and give its memory back", PauseRequest,
        answer=_object(),
    ),
    _Route("post", _BOX + "/resume", "Let them go on", answer=_object()),
    _Route(
        "post", _BOX + "/commands", "Run a command: its result, or its number with `wait: false`",
        CommandRequest, answer=_RAN,
    ),
    _Route("post", _COMMAND + "/signal", "Signal its group", SignalRequest, answer=_object()),
    _Route(
        "get", _COMMAND + "/attach", "Follow its output and give it input, over a WebSocket",
        query=("stdout", "stderr"), answer="websocket",
    ),
    _Route(
        "get", _BOX + "/files", "Content of a file; with `what` its tar, description or entries",
        query=("path!", "what", "offset", "length", "follow", "depth", "user"), answer="bytes",
    ),
    _Route(
        "put", _BOX + "/files", "Write a file, or unpack a tar stream", "bytes",
        query=("path!", "request_id!", "how", "mode", "parents", "user"), answer=_object(size=_NUMBER),
    ),
    _Route("post", _BOX + "/files", "Change a path", FileChange, answer=_object()),
    _Route("get", "/v1/blobs/{digest}", "Content that a log names", answer="bytes"),
    _Route("get", "/v1/node", "The node", answer=_ref("NodeStatus")),
    _Route("post", "/v1/node/stop", "End the node daemon", StopRequest, answer=_object()),
    _Route("get", "/v1/openapi.json", "This document", answer={"type": "object"}),
    _Route("get", "/healthz", "Whether it answers", answer="text"),
)  # fmt: skip
_VALUES: Final[dict[str, Schema]] = {
    "what": {"type": "string", "enum": ["content", "tar", "stat", "list"], "default": "content"},
    "how": {"type": "string", "enum": ["write", "append", "create", "unpack"], "default": "write"},
    "mode": {"type": "string", "pattern": "^[0-7]{1,4}$"},
    "follow": {"type": "string", "enum": ["0", "1"], "default": "1"},
    "parents": {"type": "string", "enum": ["0", "1"], "default": "0"},
    "request_id": {"type": "string", "minLength": 1, "maxLength": 200},
    "digest": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    "command": _NUMBER,
    "port": {"type": "integer", "minimum": 1, "maximum": 65535},
    **{
        name: {**_NUMBER, "maximum": 2**62}
        for name in ("after", "limit", "offset", "length", "depth", "stdout", "stderr")
    },
}


def document() -> Schema:
    """Return the OpenAPI 3.1 document."""
    schemas: dict[str, Schema] = {}
    for kind in (*_TYPES, *_BODIES):
        _add(kind, schemas)
    schemas["CreateRequest"]["properties"]["spec"] = {
        "oneOf": [_ref("ContainerSpec"), _ref("FunctionSpec"), _ref("MicroVMSpec"), _ref("VMSpec")]
    }
    paths: dict[str, Schema] = {}
    for route in _ROUTES:
        paths.setdefault(route.path, {})[route.method] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "hadal node", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _add(kind: type[Any], schemas: dict[str, Schema]) -> None:
    mode = "validation" if issubclass(kind, BaseModel) else "serialization"
    own = TypeAdapter(kind).json_schema(
        ref_template="#/components/schemas/{model}", by_alias=True, mode=mode
    )
    schemas.update(own.pop("$defs", {}))
    schemas[kind.__name__] = cast(Schema, _in_base64(own))


def _in_base64(schema: object) -> object:
    """Say of bytes how they travel."""
    if isinstance(schema, list):
        return [_in_base64(part) for part in cast(list[object], schema)]
    if not isinstance(schema, dict):
        return schema
    part = cast(Schema, schema)
    if part.get("format") in ("binary", "base64"):
        return {k: v for k, v in part.items() if k != "format"} | _BASE64
    return {name: _in_base64(value) for name, value in part.items()}


def _operation(route: _Route) -> Schema:
    free = route.path == "/healthz"
    content: Schema
    if route.answer == "bytes":
        content = {"application/octet-stream": {}}
        if route.path.endswith("/files"):
            content["application/json"] = {"schema": _READ}
    elif route.answer == "image":
        content = {"image/png": {}}
    elif route.answer == "text":
        content = {"text/plain": {}}
    else:
        content = {"application/json": {"schema": route.answer}}
    responses: Schema = {route.status: {"description": "Done", "content": content}}
    if route.answer == "websocket":
        responses = {
            "101": {"description": "The stream; docs/formats/node-api.md says what is sent"}
        }
    if not free:
        error = {"application/json": {"schema": _ref("ErrorBody")}}
        for status, says in _ERRORS.items():
            responses[status] = {"description": says, "content": error}
    if any(f"{{{name}}}" in route.path for name in ("command", "digest", "port")):
        content = {"application/json": {"schema": _ref("ErrorBody")}}
        responses["404"] = {"description": "That is none", "content": content}
    operation: Schema = {"summary": route.summary, "responses": responses}
    parameters = _parameters(route)
    if parameters:
        operation["parameters"] = parameters
    if not free:
        operation["security"] = [{}, {"key": []}]
    if route.body == "bytes":
        body: Schema = {"application/octet-stream": {}}
        operation["requestBody"] = {"required": True, "content": body}
    elif route.body is not None:
        assert not isinstance(route.body, str)
        body = {"application/json": {"schema": _ref(route.body.__name__)}}
        operation["requestBody"] = {"required": True, "content": body}
    return operation


def _parameters(route: _Route) -> list[Schema]:
    named = [part[1:-1] for part in route.path.split("/") if part.startswith("{")]
    parameters: list[Schema] = [
        {"name": name, "in": "path", "required": True, "schema": _VALUES.get(name, _TEXT)}
        for name in named
    ]
    for text in route.query:
        name = text.removesuffix("!")
        schema = _VALUES.get(name, _TEXT)
        parameters.append(
            {"name": name, "in": "query", "required": text.endswith("!"), "schema": schema}
        )
    return parameters

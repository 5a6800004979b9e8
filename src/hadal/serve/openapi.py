"""The server's OpenAPI document, made from the options that the routes check (`options`).

Conversations are described as far as every client needs; the readers in `hadal.chat` accept more
spellings than a schema says well, and their errors name the field.
"""

from typing import Any, Final

from hadal import __version__
from hadal.serve.options import (
    ChatOptions,
    CompletionOptions,
    DetokenizeOptions,
    GenerateOptions,
    MessagesOptions,
    Options,
    ResponsesOptions,
    TokenizeOptions,
)

__all__ = ["document"]

Schema = dict[str, Any]

_TEXT: Final[Schema] = {"type": "string"}
_LIST: Final[Schema] = {"type": "array", "items": {"type": "object"}}
_ANY_OBJECT: Final[Schema] = {"type": "object"}
_CONTENT: Final[Schema] = {"anyOf": [_TEXT, _LIST]}


def _object(required: str, **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": required.split()}


def _message(*roles: str) -> Schema:
    roles_schema: Schema = {"type": "string", "enum": list(roles)}
    return _object("role content", role=roles_schema, content=_CONTENT)


_EFFORT: Final[Schema] = {"anyOf": [_TEXT, {"type": "integer"}, {"type": "null"}]}
_CHAT: Final = _object(
    "messages",
    messages={"type": "array", "items": _message("system", "user", "assistant"), "minItems": 1},
    tools=_LIST,
    tool_choice={"anyOf": [_TEXT, _ANY_OBJECT]},
    response_format=_ANY_OBJECT,
    reasoning_effort=_EFFORT,
    reasoning=_ANY_OBJECT,
    thinking=_ANY_OBJECT,
    chat_template_kwargs=_ANY_OBJECT,
)
_MESSAGES: Final = _object(
    "messages",
    messages={"type": "array", "items": _message("user", "assistant"), "minItems": 1},
    system=_CONTENT,
    tools=_LIST,
    tool_choice=_ANY_OBJECT,
    thinking=_ANY_OBJECT,
    output_config=_ANY_OBJECT,
)
_RESPONSES: Final = _object(
    "input",
    input=_CONTENT,
    instructions=_TEXT,
    tools=_LIST,
    tool_choice={"anyOf": [_TEXT, _ANY_OBJECT]},
    reasoning=_ANY_OBJECT,
    text=_ANY_OBJECT,
)

_POSTS: Final[tuple[tuple[str, str, type[Options], Schema | None, bool], ...]] = (
    ("/v1/chat/completions", "Continue a conversation (OpenAI)", ChatOptions, _CHAT, True),
    ("/v1/completions", "Continue texts or token ids", CompletionOptions, None, True),
    ("/v1/responses", "Continue a conversation (Responses)", ResponsesOptions, _RESPONSES, True),
    ("/v1/messages", "Continue a conversation (Anthropic)", MessagesOptions, _MESSAGES, True),
    (
        "/v1/messages/count_tokens",
        "Count the tokens of a conversation",
        MessagesOptions,
        _MESSAGES,
        False,
    ),
    ("/inference/v1/generate", "Token ids in, token ids out", GenerateOptions, None, False),
    ("/tokenize", "Token ids of a text", TokenizeOptions, None, False),
    ("/detokenize", "Text of token ids", DetokenizeOptions, None, False),
)
_GETS: Final = {
    "/v1/models": "The model that is served",
    "/health": "Whether requests can be served",
    "/readyz": "The same",
    "/livez": "Whether the process answers",
    "/version": "Version of the server",
    "/metrics": "Counters and gauges (Prometheus)",
    "/openapi.json": "This document",
}
_ERRORS: Final = {
    "400": "The request is wrong; the message says where",
    "401": "The key is missing or wrong",
    "404": "What the request goes on from is not known",
    "413": "The body is too large",
    "429": "Too much is being served, or the prompt does not fit into the cache now",
    "502": "The upstream failed",
    "503": "The server is shutting down or unwell",
}


def document() -> Schema:
    """Return the OpenAPI 3.1 document."""
    schemas: dict[str, Schema] = {
        "OpenAIError": _object("error", error=_object("message type", message=_TEXT, type=_TEXT)),
        "AnthropicError": _object(
            "type error", type={"const": "error"}, error=_object("type message", message=_TEXT)
        ),
    }
    paths: dict[str, Schema] = {}
    for path, summary, options, conversation, streams in _POSTS:
        request = _request(options, conversation, schemas)
        paths[path] = {"post": _operation(path, summary, request, streams=streams)}
    for path, summary in _GETS.items():
        paths[path] = {"get": _operation(path, summary, None, streams=False)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "hadal", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _request(
    options: type[Options], conversation: Schema | None, schemas: dict[str, Schema]
) -> Schema:
    """Return a route's body; its nested options go into `schemas`."""
    own = options.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= own.pop("$defs", {})
    if conversation is not None:
        own["properties"] = conversation["properties"] | own["properties"]
        own["required"] = [*conversation["required"], *own.get("required", ())]
        own.pop("additionalProperties")  # the readers log what they do not know
    if options is TokenizeOptions:
        own = {"anyOf": [own, _CHAT]}
    return own


def _operation(path: str, summary: str, request: Schema | None, *, streams: bool) -> Schema:
    kind = "AnthropicError" if path.startswith("/v1/messages") else "OpenAIError"
    error = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind}"}}}
    answer: Schema = {"application/json": {"schema": {"type": "object"}}}
    if path == "/metrics":
        answer = {"text/plain": {"schema": _TEXT}}
    if streams:
        answer["text/event-stream"] = {"schema": _object("data", data=_TEXT, event=_TEXT)}
    responses: Schema = {"200": {"description": "Done", "content": answer}}
    open_to_all = request is None and path != "/v1/models"
    if path in ("/health", "/readyz"):
        unwell = {"description": _ERRORS["503"], "content": answer}
        responses["503"] = unwell
    elif not open_to_all:
        for status, says in _ERRORS.items():
            responses[status] = {"description": says, "content": error}
    operation: Schema = {"summary": summary, "responses": responses}
    if not open_to_all:
        operation["security"] = [{}, {"bearer": []}, {"key": []}]
    if request is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": request}},
        }
    return operation

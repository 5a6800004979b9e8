"""`/v1/messages` and `/v1/messages/count_tokens`: the Anthropic shape."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hadal.backends.backend import Prefill
from hadal.chat.anthropic import from_anthropic_request, to_anthropic_content
from hadal.chat.sealed import seal
from hadal.encoding.deltas import (
    ArgumentsDelta,
    CallEnd,
    CallFailed,
    CallStart,
    ContentDelta,
    Delta,
    ReasoningDelta,
)
from hadal.errors import HadalError
from hadal.serve.chat_api import Piece, last_of, reasoning_headers
from hadal.serve.http import (
    anthropic_error,
    comment,
    event_stream,
    named,
    new_id,
    started,
    until_gone,
    with_pings,
)
from hadal.serve.options import MessagesOptions, checked
from hadal.serve.sampling import messages_sampling
from hadal.serve.turn import Finished, Front, Turn, Usage

__all__ = ["MessagesApi"]

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesApi:
    """The routes.

    Args:
        front: Of the server.
        ping_s: Seconds of silence after which a ping keeps a stream open.
    """

    def __init__(self, front: Front, *, ping_s: float) -> None:
        self._front = front
        self._ping_s = ping_s

    async def respond(self, request: Request, body: bytes, scope: str) -> Response:
        """Answer a request.

        Raises:
            HadalError: It cannot be answered.
        """
        conversation = from_anthropic_request(body, unknown="warn")
        options = checked(MessagesOptions, conversation.options)
        sampling = messages_sampling(options)
        turn = self._front.open(conversation, scope=scope)
        response_id = new_id("msg_")
        run = self._front.run(turn, sampling, response_id=response_id, scope=scope)
        headers = reasoning_headers(turn)
        if options.get("stream"):
            pieces = await started(run)
            writer = _Writer(self._front.model, response_id, turn)
            return event_stream(writer.stream(pieces, self._ping_s), headers)
        finished = await until_gone(request, last_of(run))
        message = _head(self._front.model, response_id) | {
            "content": to_anthropic_content(finished.message),
            **_ending(finished),
            "usage": _usage(finished.usage),
            "hadal": finished.notes,
        }
        return JSONResponse(message, headers=headers)

    async def count(self, body: bytes, scope: str) -> Response:
        """Count the tokens of a prompt without running it."""
        turn = self._front.open(from_anthropic_request(body, unknown="warn"), scope=scope)
        return JSONResponse({"input_tokens": len(turn.prompt_ids)})


def _head(model: str, response_id: str) -> dict[str, Any]:
    return {"id": response_id, "type": "message", "role": "assistant", "model": model}


def _ending(finished: Finished) -> dict[str, Any]:
    if finished.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": finished.stop}
    return {"stop_reason": _STOP_REASONS[finished.finish_reason], "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, Any]:
    """Return tokens as this API counts them: what came from the cache is not in `input_tokens`."""
    cached = usage.cached or 0
    return {
        "input_tokens": usage.prompt - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion,
    }


class _Writer:
    """Writes a stream: blocks open and close as the sections of the completion change."""

    def __init__(self, model: str, response_id: str, turn: Turn) -> None:
        self._head = _head(model, response_id)
        self._prompt_tokens = len(turn.prompt_ids)
        self._index = -1
        self._open: str | None = None
        self._thought = ""
        self._calls: dict[int, dict[str, Any]] = {}

    async def stream(self, pieces: AsyncGenerator[Piece], ping_s: float) -> AsyncGenerator[str]:
        """Write events; an error becomes one, and the stream ends."""
        usage = {"input_tokens": self._prompt_tokens, "output_tokens": 0}
        blank = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield named({"type": "message_start", "message": self._head | blank})
        try:
            async with aclosing(with_pings(pieces, ping_s)) as events:
                async for piece in events:
                    if piece is None:
                        yield named({"type": "ping"})
                    elif isinstance(piece, Prefill):
                        yield comment(f"prefill {piece.done}/{piece.total}")
                    elif isinstance(piece, Finished):
                        for event in self._end(piece):
                            yield named(event)
                    else:
                        for delta in piece.deltas:
                            for event in self._delta(delta):
                                yield named(event)
        except HadalError as err:
            yield named(anthropic_error(err))

    def _end(self, finished: Finished) -> list[dict[str, Any]]:
        last = {
            "type": "message_delta",
            "delta": _ending(finished),
            "usage": _usage(finished.usage),
            "hadal": finished.notes,
        }
        return [*self._close(), last, {"type": "message_stop"}]

    def _delta(self, delta: Delta) -> list[dict[str, Any]]:
        if isinstance(delta, ReasoningDelta):
            empty = {"type": "thinking", "thinking": "", "signature": ""}
            self._thought += delta.text
            return self._text("thinking", empty, {"type": "thinking_delta", "thinking": delta.text})
        if isinstance(delta, ContentDelta):
            empty = {"type": "text", "text": ""}
            return self._text("text", empty, {"type": "text_delta", "text": delta.text})
        if isinstance(delta, CallStart):
            self._calls[delta.index] = {"id": delta.id, "name": delta.name, "json": ""}
        elif isinstance(delta, ArgumentsDelta):
            self._calls[delta.index]["json"] += delta.text
        elif isinstance(delta, CallFailed):
            del self._calls[delta.index]
        elif isinstance(delta, CallEnd):
            return self._call(self._calls.pop(delta.index))
        return []

    def _call(self, call: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the events of a whole call; its input is an object, whatever the model wrote."""
        block = {"type": "tool_use", "id": call["id"], "name": call["name"], "input": {}}
        events = [*self._close(), self._start("tool_use", block)]
        events.append(self._piece({"type": "input_json_delta", "partial_json": call["json"]}))
        return [*events, *self._close()]

    def _text(
        self, kind: str, empty: dict[str, Any], delta: dict[str, Any]
    ) -> list[dict[str, Any]]:
        events = [] if self._open == kind else [*self._close(), self._start(kind, empty)]
        return [*events, self._piece(delta)]

    def _start(self, kind: str, block: dict[str, Any]) -> dict[str, Any]:
        self._index += 1
        self._open = kind
        return {"type": "content_block_start", "index": self._index, "content_block": block}

    def _piece(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> list[dict[str, Any]]:
        if self._open is None:
            return []
        events: list[dict[str, Any]] = []
        if self._open == "thinking":
            events.append(
                self._piece({"type": "signature_delta", "signature": seal(self._thought)})
            )
            self._thought = ""
        self._open = None
        return [*events, {"type": "content_block_stop", "index": self._index}]

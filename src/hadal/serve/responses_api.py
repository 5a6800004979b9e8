"""`/v1/responses`: OpenAI's Responses shape, with the responses of this process to go on from."""

from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hadal.backends.backend import Prefill
from hadal.chat import Conversation, Message, SystemMessage
from hadal.chat.openai_responses import from_responses_request, to_responses_output
from hadal.chat.sealed import seal
from hadal.chat.wire import read_body
from hadal.encoding.deltas import (
    ArgumentsDelta,
    CallEnd,
    CallFailed,
    CallStart,
    ContentDelta,
    Delta,
    ReasoningDelta,
)
from hadal.errors import HadalError, InvalidConversationError
from hadal.serve.chat_api import Piece, last_of, reasoning_headers
from hadal.serve.http import (
    HttpError,
    comment,
    event_stream,
    named,
    new_id,
    now,
    openai_error,
    started,
    until_gone,
    with_pings,
)
from hadal.serve.options import ResponsesOptions, checked
from hadal.serve.sampling import responses_sampling
from hadal.serve.turn import Finished, Front, Usage

__all__ = ["ResponsesApi"]

_KEPT: Final = 10_000
"""Responses that can be continued by `previous_response_id`; the oldest are forgotten."""


class ResponsesApi:
    """The route.

    Args:
        front: Of the server.
        ping_s: Seconds of silence after which a comment keeps a stream open.
    """

    def __init__(self, front: Front, *, ping_s: float) -> None:
        self._front = front
        self._ping_s = ping_s
        self._known: OrderedDict[tuple[str, str], tuple[Message, ...]] = OrderedDict()

    async def respond(self, request: Request, body: bytes, scope: str) -> Response:
        """Answer a request.

        Raises:
            HadalError: It cannot be answered.
        """
        raw = read_body(body)
        conversation = from_responses_request(raw, unknown="warn")
        options = checked(ResponsesOptions, conversation.options)
        _refuse(options)
        conversation, carried = self._with_history(conversation, scope)
        sampling = responses_sampling(options)
        turn = self._front.open(conversation, scope=scope)
        reply = _Reply(self._front.model, raw, conversation)
        run = self._front.run(turn, sampling, response_id=reply.id, scope=scope)
        keeping = self._keeping(run, reply.id, carried, conversation, scope)
        headers = reasoning_headers(turn)
        if options.get("stream"):
            pieces = await started(keeping)
            return event_stream(reply.stream(pieces, self._ping_s), headers)
        finished = await until_gone(request, last_of(keeping))
        return JSONResponse(reply.whole(finished), headers=headers)

    def _with_history(
        self, conversation: Conversation, scope: str
    ) -> tuple[Conversation, tuple[Message, ...]]:
        """Put the messages of a previous response in front, but not its instructions."""
        previous = conversation.options.get("previous_response_id")
        if previous is None:
            return conversation, _without_instructions(conversation)
        known = self._known.get((scope, previous))
        if known is None:
            raise HttpError(
                404,
                f"previous_response_id: {previous!r} is not known here",
                hint="responses are kept in memory, and not with store=false: send the whole input",
            )
        own = conversation.messages
        system = [m for m in own[:1] if isinstance(m, SystemMessage)]
        rest = own[len(system) :]
        joined = replace(conversation, messages=(*system, *known, *rest))
        return joined, (*known, *rest)

    async def _keeping(
        self,
        run: AsyncGenerator[Piece],
        response_id: str,
        carried: tuple[Message, ...],
        conversation: Conversation,
        scope: str,
    ) -> AsyncGenerator[Piece]:
        """Pass a run on, and remember what it said for the next response."""
        async with aclosing(run) as pieces:
            async for piece in pieces:
                if isinstance(piece, Finished) and conversation.options.get("store") is not False:
                    self._known[scope, response_id] = (*carried, piece.message)
                    while len(self._known) > _KEPT:
                        self._known.popitem(last=False)
                yield piece


def _without_instructions(conversation: Conversation) -> tuple[Message, ...]:
    first, *rest = conversation.messages or (None,)
    if isinstance(first, SystemMessage):
        return tuple(rest)
    return conversation.messages


def _refuse(options: Mapping[str, Any]) -> None:
    """Refuse what would have to be done and is not."""
    if options.get("conversation") is not None:
        raise InvalidConversationError(
            "lives on another server: use previous_response_id", where="conversation"
        )
    if options.get("truncation") not in (None, "disabled"):
        raise InvalidConversationError(
            "expected 'disabled': nothing is dropped behind the client's back", where="truncation"
        )
    if options.get("max_tool_calls") is not None:
        raise InvalidConversationError(
            "counts built-in tools, of which there is none", where="max_tool_calls"
        )


class _Reply:
    """Writes what happened as this API has it."""

    def __init__(self, model: str, raw: Mapping[str, Any], conversation: Conversation) -> None:
        self.id = new_id("resp_")
        self._conversation = conversation
        echoed = {
            name: raw[name]
            for name in ("instructions", "metadata", "temperature", "top_p", "max_output_tokens")
            if name in raw
        }
        self._base: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": now(),
            "model": model,
            "previous_response_id": raw.get("previous_response_id"),
            "parallel_tool_calls": raw.get("parallel_tool_calls", True),
            "tool_choice": raw.get("tool_choice") or "auto",
            "tools": raw.get("tools") or [],
            "error": None,
            "incomplete_details": None,
            **echoed,
        }
        self._sealed = "reasoning.encrypted_content" in (raw.get("include") or ())
        self._sequence = 0
        self._open: dict[str, Any] | None = None
        self._text = ""
        self._index = -1
        self._calls: dict[int, dict[str, Any]] = {}
        self._num_calls = 0
        self._stem = self.id.removeprefix("resp_")

    def whole(self, finished: Finished) -> dict[str, Any]:
        """Return the finished response."""
        message = finished.message
        if not message.reasoning_content:
            message = replace(message, reasoning_content=None)
        cut = finished.finish_reason == "length"
        return self._base | {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": to_responses_output(message, response_id=self.id, sealed=self._sealed),
            "usage": _usage(finished.usage),
            "hadal": finished.notes,
        }

    async def stream(self, pieces: AsyncGenerator[Piece], ping_s: float) -> AsyncGenerator[str]:
        """Write events; an error becomes one, and the stream ends."""
        started = self._base | {"status": "in_progress", "output": []}
        yield self._event("response.created", response=started)
        yield self._event("response.in_progress", response=started)
        try:
            async with aclosing(with_pings(pieces, ping_s)) as events:
                async for piece in events:
                    if piece is None:
                        yield comment("ping")
                    elif isinstance(piece, Prefill):
                        yield comment(f"prefill {piece.done}/{piece.total}")
                    elif isinstance(piece, Finished):
                        for event in self._end(piece):
                            yield event
                    else:
                        for delta in piece.deltas:
                            for event in self._delta(delta):
                                yield event
        except HadalError as err:
            fault = openai_error(err)["error"]
            failed = self._base | {"status": "failed", "output": []}
            failed["error"] = {"code": fault["code"], "message": fault["message"]}
            yield self._event("response.failed", response=failed)

    def _event(self, kind: str, **fields: Any) -> str:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return named(event)

    def _end(self, finished: Finished) -> list[str]:
        whole = self.whole(finished)
        events = self._close(whole["status"])
        for index in range(self._index + 1, len(whole["output"])):  # an answer without a word
            item = whole["output"][index]
            events.append(self._event("response.output_item.added", output_index=index, item=item))
            events.append(self._event("response.output_item.done", output_index=index, item=item))
        return [*events, self._event(f"response.{whole['status']}", response=whole)]

    def _delta(self, delta: Delta) -> list[str]:
        if isinstance(delta, ReasoningDelta):
            return self._more("reasoning", delta.text)
        if isinstance(delta, ContentDelta):
            return self._more("message", delta.text)
        if isinstance(delta, CallStart):
            self._calls[delta.index] = {"call_id": delta.id, "name": delta.name, "arguments": ""}
        elif isinstance(delta, ArgumentsDelta):
            self._calls[delta.index]["arguments"] += delta.text
        elif isinstance(delta, CallFailed):
            del self._calls[delta.index]
        elif isinstance(delta, CallEnd):
            return self._call(self._calls.pop(delta.index))
        return []

    def _call(self, call: dict[str, Any]) -> list[str]:
        """Return the events of a whole call."""
        events = self._close("completed")
        self._index += 1
        item_id = f"fc_{self._stem}_{self._num_calls}"
        self._num_calls += 1
        item = {"id": item_id, "type": "function_call", **call, "status": "completed"}
        at = {"output_index": self._index, "item_id": item_id}
        text = call["arguments"]
        blank = item | {"arguments": "", "status": "in_progress"}
        for kind, fields in (
            ("output_item.added", {"output_index": self._index, "item": blank}),
            ("function_call_arguments.delta", at | {"delta": text}),
            ("function_call_arguments.done", at | {"arguments": text, "name": call["name"]}),
            ("output_item.done", {"output_index": self._index, "item": item}),
        ):
            events.append(self._event(f"response.{kind}", **fields))
        return events

    def _more(self, kind: str, text: str) -> list[str]:
        events: list[str] = []
        if self._open is None or self._open["type"] != kind:
            events += [*self._close("completed"), *self._begin(kind)]
        self._text += text
        extra = {"logprobs": []} if kind == "message" else {}
        name = "output_text" if kind == "message" else "reasoning_text"
        return [*events, self._event(f"response.{name}.delta", delta=text, **self._at(), **extra)]

    def _at(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": self._index, "content_index": 0}

    def _begin(self, kind: str) -> list[str]:
        self._index += 1
        self._text = ""
        prefix = "msg" if kind == "message" else "rs"
        self._open = {"id": f"{prefix}_{self._stem}", "type": kind, "status": "in_progress"}
        if kind == "message":
            self._open |= {"role": "assistant", "content": []}
        else:
            self._open |= {"summary": [], "content": []}
        return [
            self._event("response.output_item.added", output_index=self._index, item=self._open),
            self._event("response.content_part.added", part=self._part(), **self._at()),
        ]

    def _part(self) -> dict[str, Any]:
        assert self._open is not None
        if self._open["type"] == "message":
            return {"type": "output_text", "text": self._text, "annotations": []}
        return {"type": "reasoning_text", "text": self._text}

    def _close(self, status: str) -> list[str]:
        """End the item that is open."""
        if self._open is None:
            return []
        message = self._open["type"] == "message"
        name, extra = ("output_text", {"logprobs": []}) if message else ("reasoning_text", {})
        part = self._part()
        item = self._open | {"content": [part], "status": status}
        if self._sealed and not message:
            item["encrypted_content"] = seal(self._text)
        events = [
            self._event(f"response.{name}.done", text=self._text, **self._at(), **extra),
            self._event("response.content_part.done", part=part, **self._at()),
            self._event("response.output_item.done", output_index=self._index, item=item),
        ]
        self._open = None
        return events


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached or 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }

"""`/v1/chat/completions`: OpenAI's chat shape, with reasoning under both names in use."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hadal.backends.backend import Prefill, TokenLogprob
from hadal.chat import AssistantMessage, Conversation
from hadal.chat.openai_chat import from_chat_request
from hadal.chat.openai_messages import to_chat_message
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
from hadal.serve.http import (
    comment,
    data,
    event_stream,
    new_id,
    now,
    openai_error,
    started,
    until_gone,
    with_pings,
)
from hadal.serve.options import ChatOptions, checked
from hadal.serve.sampling import chat_sampling, seeded
from hadal.serve.turn import Finished, Front, Said, Turn, Usage

__all__ = [
    "ChatApi",
    "Piece",
    "last_of",
    "logprob_entry",
    "reasoning_headers",
    "token_counts",
    "usage_of",
]

Piece = Prefill | Said | Finished


class ChatApi:
    """The route.

    Args:
        front: Of the server.
        ping_s: Seconds of silence after which a comment keeps a stream open.
    """

    def __init__(self, front: Front, *, ping_s: float) -> None:
        self._front = front
        self._ping_s = ping_s

    async def respond(self, request: Request, body: bytes, scope: str) -> Response:
        """Answer a request.

        Raises:
            HadalError: It cannot be answered.
        """
        conversation = from_chat_request(body, unknown="warn")
        options = checked(ChatOptions, conversation.options)
        conversation = _continued(conversation)
        sampling = chat_sampling(options)
        count = options.get("n", 1)
        turn = self._front.open(conversation, scope=scope)
        reply = _Reply(self._front, turn, options)
        runs = [
            self._front.run(turn, seeded(sampling, i), response_id=reply.id, scope=scope)
            for i in range(count)
        ]
        headers = reasoning_headers(turn)
        if options.get("stream"):
            merged = runs[0] if count == 1 else None
            pieces = _indexed(merged, 0) if merged is not None else _merged(runs)
            pieces = await started(pieces)
            return event_stream(reply.stream(pieces, self._ping_s, count), headers)
        finished = await until_gone(request, _all(runs))
        return JSONResponse(reply.whole(finished), headers=headers)


def _continued(conversation: Conversation) -> Conversation:
    options = conversation.options
    if options.get("add_generation_prompt") is False and not options.get("continue_final_message"):
        raise InvalidConversationError(
            "must be true unless continue_final_message is", where="add_generation_prompt"
        )
    if not options.get("continue_final_message"):
        return conversation
    *before, last = conversation.messages
    if not isinstance(last, AssistantMessage):
        raise InvalidConversationError(
            "needs an assistant message at the end", where="continue_final_message"
        )
    return replace(conversation, messages=(*before, replace(last, prefix=True)))


def reasoning_headers(turn: Turn) -> dict[str, str]:
    """Return headers that say how many turns had lost their reasoning."""
    headers: dict[str, str] = {}
    if turn.restored:
        headers["x-hadal-reasoning-restored"] = str(len(turn.restored))
    if turn.missing:
        headers["x-hadal-reasoning-missing"] = str(len(turn.missing))
    return headers


async def last_of(run: AsyncGenerator[Piece]) -> Finished:
    """Run a turn to its end."""
    found: Finished | None = None
    async with aclosing(run) as pieces:
        async for piece in pieces:
            if isinstance(piece, Finished):
                found = piece
    assert found is not None
    return found


async def _all(runs: list[AsyncGenerator[Piece]]) -> list[Finished]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(last_of(run)) for run in runs]
    return [task.result() for task in tasks]


async def _indexed(run: AsyncGenerator[Piece], index: int) -> AsyncGenerator[tuple[int, Piece]]:
    async with aclosing(run) as pieces:
        async for piece in pieces:
            yield index, piece


async def _merged(runs: list[AsyncGenerator[Piece]]) -> AsyncGenerator[tuple[int, Piece]]:
    """Return the pieces of several choices as they come."""
    queue: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue()

    async def pump(run: AsyncGenerator[Piece], index: int) -> None:
        try:
            async for item in _indexed(run, index):
                await queue.put(item)
        except HadalError as err:
            await queue.put(err)
        await queue.put(None)

    tasks = [asyncio.ensure_future(pump(run, i)) for i, run in enumerate(runs)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Reply:
    """Writes what happened as this API has it."""

    def __init__(self, front: Front, turn: Turn, options: Any) -> None:
        self.id = new_id("chatcmpl-")
        self._front = front
        self._turn = turn
        self._created = now()
        self._hidden = options.get("include_reasoning") is False
        self._ids = bool(options.get("return_token_ids"))
        stream = options.get("stream_options", {})
        self._with_usage = bool(stream.get("include_usage"))
        self._running_usage = bool(stream.get("continuous_usage_stats"))
        self._num_said = 0
        self._calls: dict[tuple[int, int], dict[str, Any]] = {}

    def whole(self, choices: list[Finished]) -> dict[str, Any]:
        """Return the body of a response that is not streamed."""
        body = self._head("chat.completion") | {
            "choices": [self._choice(i, finished) for i, finished in enumerate(choices)],
            "usage": usage_of([f.usage for f in choices]),
            "hadal": choices[0].notes,
        }
        if self._ids:
            body["prompt_token_ids"] = self._turn.prompt_ids
        return body

    def _choice(self, index: int, finished: Finished) -> dict[str, Any]:
        message = to_chat_message(finished.message)
        if self._hidden:
            message.pop("reasoning_content", None)
            message.pop("reasoning", None)
        if message.get("tool_calls") and not message["content"]:
            message["content"] = None
        choice: dict[str, Any] = {
            "index": index,
            "message": message,
            "finish_reason": finished.finish_reason,
            "stop_reason": finished.stop,
            "logprobs": self._logprobs(finished.logprobs),
        }
        if self._ids:
            choice["token_ids"] = list(finished.token_ids)
        return choice

    async def stream(
        self, pieces: AsyncGenerator[tuple[int, Piece]], ping_s: float, count: int
    ) -> AsyncGenerator[str]:
        """Write events; errors after the first become an event, and the stream ends."""
        usages: list[Usage] = []
        for index in range(count):
            first = {"role": "assistant", "content": ""}
            extra = {"prompt_token_ids": self._turn.prompt_ids} if self._ids else {}
            yield data(self._chunk(index, first) | extra)
        try:
            async with aclosing(with_pings(pieces, ping_s)) as events:
                async for event in events:
                    if event is None:
                        yield comment("ping")
                        continue
                    index, piece = event
                    if isinstance(piece, Finished):
                        usages.append(piece.usage)
                    for text in self._written(index, piece):
                        yield text
            if self._with_usage:
                last = self._head("chat.completion.chunk")
                yield data(last | {"choices": [], "usage": usage_of(usages)})
        except HadalError as err:
            yield data(openai_error(err))
        yield "data: [DONE]\n\n"

    def _written(self, index: int, piece: Piece) -> list[str]:
        if isinstance(piece, Prefill):
            return [comment(f"prefill {piece.done}/{piece.total}")]
        if isinstance(piece, Finished):
            chunk = self._chunk(index, {}, finish=piece.finish_reason, stop=piece.stop)
            return [data(chunk | {"hadal": piece.notes})]
        deltas = [d for delta in piece.deltas if (d := self._delta(index, delta)) is not None]
        if (piece.logprobs or (self._ids and piece.token_ids)) and not deltas:
            deltas = [{}]
        chunks = [self._chunk(index, delta) for delta in deltas]
        if chunks and piece.logprobs:
            chunks[0]["choices"][0]["logprobs"] = self._logprobs(piece.logprobs)
        if chunks and self._ids:
            chunks[0]["choices"][0]["token_ids"] = list(piece.token_ids)
        self._num_said += len(piece.token_ids)
        if self._running_usage:
            counts = token_counts(len(self._turn.prompt_ids), self._num_said)
            chunks = [chunk | {"usage": counts} for chunk in chunks]
        return [data(chunk) for chunk in chunks]

    def _delta(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """Return a delta; a call is told when it is whole, so that none is ever taken back."""
        if isinstance(delta, ReasoningDelta):
            text = delta.text
            return None if self._hidden else {"reasoning_content": text, "reasoning": text}
        if isinstance(delta, ContentDelta):
            return {"content": delta.text}
        if isinstance(delta, CallStart):
            function = {"name": delta.name, "arguments": ""}
            call = {"id": delta.id, "type": "function", "function": function}
            self._calls[index, delta.index] = call
        elif isinstance(delta, ArgumentsDelta):
            self._calls[index, delta.index]["function"]["arguments"] += delta.text
        elif isinstance(delta, CallFailed):
            del self._calls[index, delta.index]
        elif isinstance(delta, CallEnd):
            call = self._calls[index, delta.index]
            done = sum(1 for i, c in self._calls.items() if i[0] == index and c.get("_told"))
            told = {"index": done, **call}
            call["_told"] = True
            return {"tool_calls": [told]}
        return None

    def _chunk(
        self, index: int, delta: dict[str, Any], *, finish: str | None = None, stop: Any = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        if finish is not None:
            choice["stop_reason"] = stop
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._front.model}

    def _logprobs(self, scored: tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
        if not scored:
            return None
        tokenizer = self._front.encoding.tokenizer
        return {"content": [logprob_entry(tokenizer.decode_bytes, s) for s in scored]}


def logprob_entry(decode: Any, scored: TokenLogprob) -> dict[str, Any]:
    """Return one token's log-probabilities as the chat API writes them."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw: bytes = decode([token_id])
        text = raw.decode("utf-8", errors="replace")
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    top = [entry(choice.token_id, choice.logprob) for choice in scored.top]
    return entry(scored.token_id, scored.logprob) | {"top_logprobs": top}


def token_counts(prompt: int, completion: int) -> dict[str, Any]:
    """Return the tokens of a request as OpenAI's APIs name them."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def usage_of(usages: list[Usage]) -> dict[str, Any]:
    """Return the tokens of a response, all choices together."""
    prompt, completion = usages[0].prompt, sum(u.completion for u in usages)
    reasoning = sum(u.reasoning for u in usages)
    usage = token_counts(prompt, completion)
    usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    cached = usages[0].cached
    if cached is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
        usage["prompt_cache_hit_tokens"] = cached
        usage["prompt_cache_miss_tokens"] = prompt - cached
    return usage

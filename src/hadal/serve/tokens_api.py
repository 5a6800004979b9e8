"""Routes that speak of tokens: completions, the trainers' generate, tokenize and detokenize."""

import asyncio
import codecs
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hadal.backends.backend import Chunk, Ended, Generation, Prefill, TokenLogprob
from hadal.chat.openai_chat import from_chat_request
from hadal.chat.wire import read_body
from hadal.encoding.tokens import BOS
from hadal.errors import HadalError, InvalidConversationError
from hadal.serve.chat_api import token_counts
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
from hadal.serve.options import (
    CompletionOptions,
    DetokenizeOptions,
    GenerateOptions,
    TokenizeOptions,
    checked,
)
from hadal.serve.sampling import completion_sampling, seeded
from hadal.serve.turn import Front

__all__ = ["TokensApi"]


@dataclass(frozen=True)
class _Done:
    prompt_ids: list[int]
    token_ids: tuple[int, ...]
    data: bytes
    logprobs: tuple[TokenLogprob, ...]
    ended: Ended


class TokensApi:
    """The routes.

    Args:
        front: Of the server.
        ping_s: Seconds of silence after which a comment keeps a stream open.
    """

    def __init__(self, front: Front, *, ping_s: float) -> None:
        self._front = front
        self._ping_s = ping_s

    async def complete(self, request: Request, body: bytes, scope: str) -> Response:
        """Answer `/v1/completions`: prompts are texts, in which control tokens count, or ids."""
        options = checked(CompletionOptions, read_body(body))
        prompts = self._prompts(options)
        count = options.get("n", 1)
        if options.get("best_of", count) != count:
            raise InvalidConversationError("expected the same as n", where="best_of")
        sampling = completion_sampling(options)
        if options.get("stream"):
            if len(prompts) * count > 1:
                raise InvalidConversationError("streams one prompt and one choice", where="stream")
            if options.get("echo") and "logprobs" in sampling:
                raise InvalidConversationError("has no logprobs when streamed", where="echo")
            events = await started(self._events(prompts[0], sampling))
            return event_stream(self._stream(events, prompts[0], options))
        work = [(ids, seeded(sampling, i)) for ids in prompts for i in range(count)]
        done = await until_gone(request, self._all(work))
        choices = [self._choice(i, d, options) for i, d in enumerate(done)]
        usage = _usage(done[::count], done)
        head = self._head("text_completion")
        return JSONResponse(head | {"choices": choices, "usage": usage})

    async def generate(self, request: Request, body: bytes, scope: str) -> Response:
        """Answer `/inference/v1/generate`: ids in, ids out, as RL trainers ask for it."""
        options = checked(GenerateOptions, read_body(body))
        asked = options.get("sampling_params", {})
        sampling = completion_sampling(asked)
        if "max_tokens" not in asked:
            del sampling["max_tokens"]
        if options.get("return_routed_experts") or asked.get("return_routed_experts"):
            sampling["return_routed_experts"] = True
        prompt = options.get("token_ids") or options.get("prompt_token_ids")
        if not prompt:
            raise InvalidConversationError("expected token ids", where="token_ids")
        work = [(prompt, seeded(sampling, i)) for i in range(asked.get("n", 1))]
        done = await until_gone(request, self._all(work))
        choices = [
            {
                "index": i,
                "token_ids": list(d.token_ids),
                "finish_reason": d.ended.reason,
                "stop_reason": d.ended.stop,
                "logprobs": _generate_logprobs(d) if "logprobs" in sampling else None,
                "routed_experts": d.ended.routed_experts,
            }
            for i, d in enumerate(done)
        ]
        ended = done[0].ended
        return JSONResponse(
            {
                "request_id": options.get("request_id") or new_id("gen-"),
                "choices": choices,
                "prompt_token_ids": prompt,
                "prompt_logprobs": _plain_logprobs(ended.prompt_logprobs),
                "weight_version": ended.weight_version,
                "usage": _usage(done[:1], done),
                "hadal": {"prefix": ended.prefix},
            }
        )

    def tokenize(self, body: bytes, scope: str) -> Response:
        """Answer `/tokenize`: the ids of a text, or of a conversation."""
        options = read_body(body)
        if "messages" in options:
            turn = self._front.open(from_chat_request(options, unknown="warn"), scope=scope)
            ids = turn.prompt_ids
        else:
            fields = checked(TokenizeOptions, options)
            ids = self._ids_of(fields["prompt"], special=fields.get("add_special_tokens", True))
        limit = self._front.backend.max_model_len
        return JSONResponse({"count": len(ids), "max_model_len": limit, "tokens": ids})

    def detokenize(self, body: bytes) -> Response:
        """Answer `/detokenize`: the text of ids, control tokens spelled out."""
        tokens = checked(DetokenizeOptions, read_body(body))["tokens"]
        return JSONResponse({"prompt": self._front.encoding.decode(tokens)})

    def _prompts(self, options: Mapping[str, Any]) -> list[list[int]]:
        """Return the ids of each prompt."""
        prompt = options["prompt"]
        several = prompt if isinstance(prompt, list) and not _is_ids(prompt) else [prompt]
        special = options.get("add_special_tokens", True)
        prompts = [self._ids_of(p, special=special) if isinstance(p, str) else p for p in several]
        if not prompts or not all(prompts):
            raise InvalidConversationError("expected a text or token ids", where="prompt")
        return prompts

    def _ids_of(self, text: str, *, special: bool) -> list[int]:
        tokenizer = self._front.encoding.tokenizer
        ids = tokenizer.encode_raw(text)
        bos = tokenizer.control_id(BOS)
        return [bos, *ids] if special and ids[:1] != [bos] else ids

    async def _events(
        self, ids: list[int], sampling: dict[str, Any]
    ) -> AsyncGenerator[Prefill | Chunk | Ended]:
        generation = Generation(prompt_ids=ids, sampling=sampling)
        async with self._front.backend.generate(generation) as events, aclosing(events) as events:
            async for event in events:
                if isinstance(event, Ended) and event.error is not None:
                    raise event.error
                yield event

    async def _run(self, ids: list[int], sampling: dict[str, Any]) -> _Done:
        chunks: list[Chunk] = []
        ended: Ended | None = None
        async with aclosing(self._events(ids, sampling)) as events:
            async for event in events:
                if isinstance(event, Chunk):
                    chunks.append(event)
                elif isinstance(event, Ended):
                    ended = event
        assert ended is not None
        tokens = tuple(t for c in chunks for t in c.token_ids)
        scored = tuple(s for c in chunks for s in c.logprobs)
        return _Done(ids, tokens, b"".join(c.data for c in chunks), scored, ended)

    async def _all(self, work: list[tuple[list[int], dict[str, Any]]]) -> list[_Done]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._run(ids, sampling)) for ids, sampling in work]
        return [task.result() for task in tasks]

    def _choice(self, index: int, done: _Done, options: Mapping[str, Any]) -> dict[str, Any]:
        text, stop = done.data.decode("utf-8", errors="replace"), done.ended.stop
        echoed = self._front.encoding.decode(done.prompt_ids) if options.get("echo") else ""
        choice: dict[str, Any] = {
            "index": index,
            "text": echoed + text,
            "finish_reason": done.ended.reason,
            "stop_reason": stop if isinstance(stop, str) else None,
            "logprobs": self._logprobs(done, options),
        }
        if options.get("return_token_ids"):
            choice |= {"prompt_token_ids": done.prompt_ids, "token_ids": list(done.token_ids)}
        return choice

    def _logprobs(self, done: _Done, options: Mapping[str, Any]) -> dict[str, Any] | None:
        if options.get("logprobs") is None:
            return None
        if not options.get("echo"):
            return self._scored(list(done.token_ids), list(done.logprobs), options)
        # the first token of a prompt has no probability
        scored = [None, *(done.ended.prompt_logprobs or ()), *done.logprobs]
        return self._scored([*done.prompt_ids, *done.token_ids], scored, options)

    def _scored(
        self,
        ids: list[int],
        scored: Sequence[TokenLogprob | None],
        options: Mapping[str, Any],
        offset: int = 0,
    ) -> dict[str, Any]:
        """Return log-probabilities as this API has them; `offset`: where the first token's text is."""

        def name(token_id: int) -> str:
            as_id = options.get("return_tokens_as_token_ids")
            return f"token_id:{token_id}" if as_id else self._front.encoding.decode([token_id])

        tokens = [name(i) for i in ids]
        ends = accumulate((len(token) for token in tokens), initial=offset)
        return {
            "tokens": tokens,
            "token_logprobs": [None if s is None else s.logprob for s in scored],
            "top_logprobs": [
                None if s is None else {name(c.token_id): c.logprob for c in s.top} for s in scored
            ],
            "text_offset": list(ends)[:-1],
        }

    async def _stream(
        self, events: AsyncGenerator[Prefill | Chunk | Ended], ids: list[int], options: Any
    ) -> AsyncGenerator[str]:
        head = self._head("text_completion")
        tokens: list[int] = []
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        told = 0
        done = _Done(ids, (), b"", (), Ended(reason="error"))
        try:
            if options.get("echo"):
                yield data(head | _text_choice(self._front.encoding.decode(ids)))
            async with aclosing(with_pings(events, self._ping_s)) as items:
                async for event in items:
                    if event is None:
                        yield comment("ping")
                    elif isinstance(event, Prefill):
                        yield comment(f"prefill {event.done}/{event.total}")
                    elif isinstance(event, Chunk):
                        tokens += event.token_ids
                        written = _text_choice(decoder.decode(event.data))
                        [choice] = written["choices"]
                        if options.get("return_token_ids"):
                            choice["token_ids"] = list(event.token_ids)
                        if options.get("logprobs") is not None:
                            own = list(event.token_ids)
                            choice["logprobs"] = self._scored(own, event.logprobs, options, told)
                        told += len(choice["text"])
                        if options.get("stream_options", {}).get("continuous_usage_stats"):
                            written["usage"] = token_counts(len(ids), len(tokens))
                        yield data(head | written)
                    else:
                        rest = decoder.decode(b"", final=True)
                        yield data(head | _text_choice(rest, event.reason))
                        done = _Done(ids, tuple(tokens), b"", (), event)
            if options.get("stream_options", {}).get("include_usage"):
                yield data(head | {"choices": [], "usage": _usage([done], [done])})
        except HadalError as err:
            yield data(openai_error(err))
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": new_id("cmpl-"), "object": kind, "created": now(), "model": self._front.model}


def _text_choice(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]}


def _is_ids(prompt: list[Any]) -> bool:
    return all(isinstance(p, int) for p in prompt)


def _usage(prompts: list[_Done], done: list[_Done]) -> dict[str, Any]:
    prompt = sum(len(d.prompt_ids) for d in prompts)
    completion = sum(len(d.token_ids) for d in done)
    cached = sum(d.ended.cached_tokens or 0 for d in prompts)
    return token_counts(prompt, completion) | {"prompt_tokens_details": {"cached_tokens": cached}}


def _plain_logprobs(scored: tuple[TokenLogprob, ...] | None) -> list[dict[str, Any]] | None:
    if scored is None:
        return None
    return [
        {
            "token_id": s.token_id,
            "logprob": s.logprob,
            "top": [{"token_id": c.token_id, "logprob": c.logprob} for c in s.top],
        }
        for s in scored
    ]


def _generate_logprobs(done: _Done) -> dict[str, Any]:
    """Return vLLM's shape, tokens named by their ids."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": f"token_id:{token_id}", "logprob": logprob}

    return {
        "content": [
            entry(s.token_id, s.logprob)
            | {"top_logprobs": [entry(c.token_id, c.logprob) for c in s.top]}
            for s in done.logprobs
        ]
    }

"""Routes that speak of tokens: completions, the trainers' generate, tokenize and detokenize."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hadal.chat.openai_chat import from_chat_request
from hadal.chat.wire import read_body
from hadal.encoding.tokens import BOS
from hadal.errors import HadalError, InvalidConversationError
from hadal.serve.backend import Chunk, Ended, Generation, Prefill, TokenLogprob
from hadal.serve.http import (
    comment,
    data,
    event_stream,
    first_of,
    new_id,
    now,
    openai_error,
    until_gone,
    with_pings,
)
from hadal.serve.sampling import completion_sampling
from hadal.serve.turn import Front

__all__ = ["TokensApi"]

_COMPLETION_FIELDS: Final = frozenset(
    "model prompt temperature top_p top_k min_p max_tokens min_tokens stop stop_token_ids ignore_eos "
    "stream stream_options seed n logprobs prompt_logprobs echo presence_penalty frequency_penalty "
    "repetition_penalty logit_bias user add_special_tokens return_token_ids best_of suffix "
    "skip_special_tokens spaces_between_special_tokens return_tokens_as_token_ids".split()
)
_GENERATE_FIELDS: Final = frozenset(
    "model token_ids prompt_token_ids request_id sampling_params stream cache_salt priority features "
    "return_routed_experts".split()
)


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
        options = _checked(read_body(body), _COMPLETION_FIELDS)
        prompts = self._prompts(options)
        count = options.get("n", 1)
        if (
            not isinstance(count, int)
            or not 1 <= count <= 128
            or options.get("best_of", count) != count
        ):
            raise InvalidConversationError("expected 1 to 128, and best_of equal to it", where="n")
        if options.get("suffix"):
            raise InvalidConversationError("this model does not fill gaps", where="suffix")
        sampling = completion_sampling(options)
        if options.get("stream"):
            if len(prompts) * count > 1:
                raise InvalidConversationError("streams one prompt and one choice", where="stream")
            _, events = await first_of(self._events(prompts[0], sampling))
            return event_stream(self._stream(events, prompts[0], options))
        work = [(ids, sampling | _seed(sampling, i)) for ids in prompts for i in range(count)]
        done = await until_gone(request, self._all(work))
        choices = [self._choice(i, d, options) for i, d in enumerate(done)]
        usage = _usage(done[::count], done)
        head = self._head("text_completion")
        return JSONResponse(head | {"choices": choices, "usage": usage})

    async def generate(self, request: Request, body: bytes, scope: str) -> Response:
        """Answer `/inference/v1/generate`: ids in, ids out, as RL trainers ask for it."""
        options = _checked(read_body(body), _GENERATE_FIELDS)
        ids = options.get("token_ids", options.get("prompt_token_ids"))
        asked = options.get("sampling_params") or {}
        if not isinstance(asked, Mapping):
            raise InvalidConversationError("expected an object", where="sampling_params")
        known = _checked(asked, _COMPLETION_FIELDS | {"return_routed_experts", "detokenize"})
        sampling = completion_sampling({"max_tokens": 1 << 30, **known})
        if known.get("max_tokens") is None:
            del sampling["max_tokens"]
        if options.get("return_routed_experts") or known.get("return_routed_experts"):
            sampling["return_routed_experts"] = True
        count = known.get("n", 1)
        [prompt] = self._prompts({"prompt": ids})
        work = [(prompt, sampling | _seed(sampling, i)) for i in range(count)]
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
            fields = _checked(options, frozenset({"model", "prompt", "add_special_tokens"}))
            [ids] = self._prompts(fields)
        limit = self._front.backend.max_model_len
        return JSONResponse({"count": len(ids), "max_model_len": limit, "tokens": ids})

    def detokenize(self, body: bytes) -> Response:
        """Answer `/detokenize`: the text of ids, control tokens spelled out."""
        fields = _checked(read_body(body), frozenset({"model", "tokens"}))
        [ids] = self._prompts({"prompt": fields.get("tokens")})
        return JSONResponse({"prompt": self._front.encoding.decode(ids)})

    def _prompts(self, options: Mapping[str, Any]) -> list[list[int]]:
        """Return the ids of each prompt."""
        prompt = options.get("prompt")
        special = options.get("add_special_tokens", True)
        if isinstance(prompt, str):
            return [self._ids_of(prompt, special=special)]
        if isinstance(prompt, list) and prompt:
            if all(isinstance(p, str) for p in prompt):
                return [self._ids_of(p, special=special) for p in prompt]
            if all(_is_id(p) for p in prompt):
                return [list(prompt)]
            if all(isinstance(p, list) and p and all(map(_is_id, p)) for p in prompt):
                return [list(p) for p in prompt]
        raise InvalidConversationError(
            "expected a text, token ids, or a list of either, none of them empty", where="prompt"
        )

    def _ids_of(self, text: str, *, special: bool) -> list[int]:
        tokenizer = self._front.encoding.tokenizer
        ids = tokenizer.encode_raw(text)
        bos = tokenizer.control_id(BOS)
        ids = [bos, *ids] if special and ids[:1] != [bos] else ids
        if not ids:
            raise InvalidConversationError("is empty", where="prompt")
        return ids

    async def _events(
        self, ids: list[int], sampling: dict[str, Any]
    ) -> AsyncGenerator[Prefill | Chunk | Ended]:
        generation = Generation(prompt_ids=ids, sampling=sampling)
        async with self._front.backend.generate(generation) as events:
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
        entries: list[TokenLogprob | None] = list(done.logprobs)
        ids = list(done.token_ids)
        if options.get("echo"):  # the first token of a prompt has no probability
            entries = [None, *(done.ended.prompt_logprobs or ()), *entries]
            ids = [*done.prompt_ids, *ids]
        as_ids = bool(options.get("return_tokens_as_token_ids"))
        tokens = [self._token(i, as_ids=as_ids) for i in ids]
        offsets, at = [], 0
        for token in tokens:
            offsets.append(at)
            at += len(token)
        top = [
            None
            if e is None
            else {self._token(c.token_id, as_ids=as_ids): c.logprob for c in e.top}
            for e in entries
        ]
        values = [None if e is None else e.logprob for e in entries]
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _token(self, token_id: int, *, as_ids: bool) -> str:
        return f"token_id:{token_id}" if as_ids else self._front.encoding.decode([token_id])

    async def _stream(
        self, events: AsyncGenerator[Prefill | Chunk | Ended], ids: list[int], options: Any
    ) -> AsyncGenerator[str]:
        head = self._head("text_completion")
        tokens: list[int] = []
        raw = b""
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
                        raw += event.data
                        text = raw[told:].decode("utf-8", errors="ignore")
                        told += len(text.encode())
                        choice = _text_choice(text)
                        if options.get("return_token_ids"):
                            choice["choices"][0]["token_ids"] = list(event.token_ids)
                        yield data(head | choice)
                    else:
                        yield data(head | _text_choice("", event.reason))
                        done = _Done(ids, tuple(tokens), raw, (), event)
            if (options.get("stream_options") or {}).get("include_usage"):
                yield data(head | {"choices": [], "usage": _usage([done], [done])})
        except HadalError as err:
            yield data(openai_error(err))
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": new_id("cmpl-"), "object": kind, "created": now(), "model": self._front.model}


def _text_choice(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]}


def _checked(options: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    unknown = sorted(name for name in options if name not in known)
    if unknown:
        raise InvalidConversationError("is not a known field", where=unknown[0])
    return {name: value for name, value in options.items() if value is not None}


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _seed(sampling: dict[str, Any], index: int) -> dict[str, Any]:
    return {"seed": sampling["seed"] + index} if index and "seed" in sampling else {}


def _usage(prompts: list[_Done], done: list[_Done]) -> dict[str, Any]:
    prompt = sum(len(d.prompt_ids) for d in prompts)
    completion = sum(len(d.token_ids) for d in done)
    cached = sum(d.ended.cached_tokens or 0 for d in prompts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


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

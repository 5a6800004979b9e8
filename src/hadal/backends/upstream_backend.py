"""Another server behind ours: any completions endpoint that takes token ids or text.

We render and parse, it generates: people who run V4 on vLLM, SGLang or llama.cpp get our format from
it. Ids are sent where the endpoint takes them; text otherwise, spelled with its control tokens.
"""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, Literal

import httpx

from hadal.backends.backend import Chunk, Ended, Event, Generation, LogprobChoice, TokenLogprob
from hadal.backends.text_pieces import TextPieces
from hadal.encoding import Tokenizer
from hadal.errors import (
    ConfigError,
    ContextLengthError,
    InputError,
    UpstreamError,
    UpstreamRefusedError,
)

__all__ = ["UpstreamBackend"]

_REASONS: Final = {"stop": "stop", "length": "length", "tool_calls": "stop"}

_REFUSALS: Final = (401, 403, 404, 405)
"""What asking again does not change."""

_NO_LIST: Final = (404, 405)
"""A server that lists no models is asked for one by its name all the same."""


class UpstreamBackend:
    """Asks `/v1/completions` of another server.

    Args:
        url: Its root, with or without `/v1`.
        tokenizer: Of the model that it serves.
        model: Name that it goes by; None for the first that it lists.
        api_key: Sent as a bearer token; never logged.
        send: `ids` or `text`.
        max_model_len: Of its context; None for what it says, or a million.
        timeout_s: Without a byte, after which it counts as gone.
    """

    def __init__(
        self,
        url: str,
        tokenizer: Tokenizer,
        *,
        model: str | None = None,
        api_key: str | None = None,
        send: Literal["ids", "text"] = "ids",
        max_model_len: int | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"upstream: expected an http or https URL, got {url!r}")
        self._root = url.rstrip("/").removesuffix("/v1")
        self._tokenizer = tokenizer
        self._send = send
        self.model = model
        self.max_model_len = max_model_len or 1 << 20  # until it is asked
        self._length_given = max_model_len is not None
        self._is_ready = self._length_given and model is not None  # nothing is left to ask
        self.follows_grammars = False
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout_s)
        self._open = 0

    async def ready(self) -> None:
        """Ask the other server for its model and the length of its context, once; see `Backend.ready`."""
        if self._is_ready:
            return
        models = await self._models()
        if self.model is None:
            if not models:
                raise UpstreamRefusedError(f"{self._root} lists no model")
            self.model = next(iter(models))
        length = models.get(self.model, {}).get("max_model_len")
        if isinstance(length, int) and length > 0 and not self._length_given:
            self.max_model_len = length
        self._is_ready = True

    async def _models(self) -> dict[str, dict[str, Any]]:
        """Return what it lists, by name."""
        url = f"{self._root}/v1/models"
        try:
            reply = await self._client.get(url)
            if reply.status_code in _NO_LIST and self.model is not None:
                return {}
            if reply.status_code in _REFUSALS:
                raise _refusal(reply.status_code, reply.content[:2000])
            reply.raise_for_status()
            return {str(entry["id"]): entry for entry in reply.json()["data"]}
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as err:
            raise UpstreamError(
                f"{url}: {type(err).__name__}: {err}",
                hint="is the server running, and the key right?",
            ) from err

    @asynccontextmanager
    async def generate(self, generation: Generation) -> AsyncGenerator[AsyncGenerator[Event]]:
        """Start a completion; see `Backend.generate`. Leaving hangs up, which ends it there too."""
        await self.ready()
        if not generation.prompt_ids:
            raise InputError("prompt: expected token ids, got no token")
        if len(generation.prompt_ids) >= self.max_model_len:
            raise ContextLengthError(
                limit=self.max_model_len, actual=len(generation.prompt_ids) + 1
            )
        url, body = f"{self._root}/v1/completions", self._body(generation)
        self._open += 1
        try:
            async with self._client.stream("POST", url, json=body) as reply:
                if reply.status_code != 200:
                    raise _refusal(reply.status_code, (await reply.aread())[:2000])
                async with aclosing(self._events(reply)) as events:
                    yield events
        except httpx.HTTPError as err:
            raise UpstreamError(f"{url}: {type(err).__name__}: {err}") from err
        finally:
            self._open -= 1

    def _body(self, generation: Generation) -> dict[str, Any]:
        ids = list(generation.prompt_ids)
        sampling = dict(generation.sampling)
        unsupported = {"prompt_logprobs", "return_routed_experts"} & sampling.keys()
        if unsupported:
            raise InputError(f"{sorted(unsupported)}: not available through an upstream server")
        if "max_tokens" not in sampling:
            sampling["max_tokens"] = self.max_model_len - len(ids)
        return sampling | {
            "model": self.model,
            "prompt": ids if self._send == "ids" else self._tokenizer.decode(ids),
            "stream": True,
            "stream_options": {"include_usage": True},
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "add_special_tokens": False,
            "return_token_ids": True,
        }

    async def _events(self, reply: httpx.Response) -> AsyncGenerator[Event]:
        pieces = TextPieces(self._tokenizer)
        reason: str | None = None
        stop: str | int | None = None
        cached: int | None = None
        async for line in _lines(reply):
            if not line.startswith("data:"):
                continue
            text = line.removeprefix("data:").strip()
            if text == "[DONE]":
                reason = reason or "stop"
                break
            event = _event_of(text)
            usage = event.get("usage") or {}
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", cached)
            for choice in event.get("choices") or ():
                for chunk in self._chunks(choice, pieces):
                    yield chunk
                reason = choice.get("finish_reason") or reason
                stop = choice.get("stop_reason") or stop
        ended = Ended(reason=_reason(reason), stop=stop, cached_tokens=cached)
        for chunk in pieces.rest():  # only of a whole completion: a broken one is asked for again
            yield chunk
        yield ended

    def _chunks(self, choice: dict[str, Any], pieces: TextPieces) -> list[Chunk]:
        """Return a piece: by its ids if the server names them, by its text otherwise."""
        ids = tuple(choice.get("token_ids") or ())
        if not ids:
            return pieces.add(choice.get("text") or "")
        named = Chunk(ids, self._tokenizer.decode_bytes(ids), self._logprobs(choice, ids))
        return [*pieces.rest(), named]

    def _logprobs(self, choice: dict[str, Any], ids: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
        found = choice.get("logprobs") or {}
        values: list[float] = found.get("token_logprobs") or []
        tops: list[dict[str, float]] = found.get("top_logprobs") or [{}] * len(values)
        if len(values) != len(ids):
            return ()
        return tuple(
            TokenLogprob(token, value, tuple(self._choices(top or {})))
            for token, value, top in zip(ids, values, tops, strict=False)
        )

    def _choices(self, top: dict[str, float]) -> list[LogprobChoice]:
        """Return those alternatives whose text is one token."""
        encoded = [(self._tokenizer.encode_raw(text), value) for text, value in top.items()]
        return [LogprobChoice(ids[0], value) for ids, value in encoded if len(ids) == 1]

    def load(self) -> tuple[int, int]:
        """Return how many requests are running and waiting."""
        return self._open, 0

    def healthy(self) -> bool:
        """Return whether requests can be served now."""
        return not self._client.is_closed

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


async def _lines(reply: httpx.Response) -> AsyncGenerator[str]:
    """Yield lines as events have them: httpx ends one at U+2028 and the like too, within a text."""
    begun = b""
    async for data in reply.aiter_bytes():
        *lines, begun = (begun + data).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", errors="replace")
    yield begun.decode("utf-8", errors="replace")


def _reason(reason: str | None) -> Literal["stop", "length"]:
    if reason is None:
        raise UpstreamError("the upstream server closed a stream before its completion ended")
    if reason not in _REASONS:
        raise UpstreamError(f"the upstream server ended a completion with {reason!r}")
    return "length" if reason == "length" else "stop"


def _event_of(text: str) -> dict[str, Any]:
    try:
        event: Any = json.loads(text)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise UpstreamError(
            f"the upstream server sent an event that is no JSON object: {text[:200]}"
        )
    if "error" in event:
        raise UpstreamError(f"the upstream server failed: {str(event['error'])[:500]}")
    return event


def _refusal(status: int, body: bytes) -> InputError | UpstreamError:
    said = body.decode("utf-8", errors="replace")
    if status in (400, 422):
        return InputError(f"the upstream server refused the request: {said}")
    kind = UpstreamRefusedError if status in _REFUSALS else UpstreamError
    return kind(f"the upstream server answered {status}: {said}")

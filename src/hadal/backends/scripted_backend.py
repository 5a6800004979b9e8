"""A backend that says what it is told to: for tests of clients and for demonstrations without a model."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

from hadal.backends.backend import Chunk, Ended, Event, Generation, TokenLogprob
from hadal.encoding import Tokenizer
from hadal.errors import ContextLengthError, InputError

__all__ = ["ScriptedBackend"]


class ScriptedBackend:
    """Plays completions one after another, token by token.

    Args:
        tokenizer: Of the format.
        completions: Items as `Tokenizer.encode_items` takes them, control tokens and texts; or ids.
        max_model_len: Longest prompt and completion together.
        delay_s: Seconds between two tokens.

    Attributes:
        prompts: Token ids of every prompt so far.
        open: Completions that are being played.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        completions: Sequence[Sequence[str] | Sequence[int]],
        *,
        max_model_len: int = 1 << 20,
        delay_s: float = 0.0,
    ) -> None:
        self.max_model_len = max_model_len
        self.follows_grammars = False
        self.prompts: list[list[int]] = []
        self.open = 0
        self._tokenizer = tokenizer
        self._left = [
            [i for i in items if isinstance(i, int)]
            or tokenizer.encode_items(i for i in items if isinstance(i, str))
            for items in completions
        ]
        self._delay_s = delay_s

    async def ready(self) -> None:
        """Do nothing: `max_model_len` is known."""

    @asynccontextmanager
    async def generate(self, generation: Generation) -> AsyncGenerator[AsyncGenerator[Event]]:
        """Start the next completion; see `Backend.generate`."""
        if not generation.prompt_ids:
            raise InputError("prompt: expected token ids, got no token")
        if len(generation.prompt_ids) >= self.max_model_len:
            raise ContextLengthError(
                limit=self.max_model_len, actual=len(generation.prompt_ids) + 1
            )
        if not self._left:
            raise InputError("the script has no completion left")
        self.prompts.append(list(generation.prompt_ids))
        self.open += 1
        try:
            yield self._play(self._left.pop(0), generation)
        finally:
            self.open -= 1

    async def _play(self, ids: list[int], generation: Generation) -> AsyncGenerator[Event]:
        limit = generation.sampling.get("max_tokens")
        scores = generation.sampling.get("logprobs") is not None  # of what is certain
        for token in ids[:limit]:
            await asyncio.sleep(self._delay_s)
            scored = (TokenLogprob(token, 0.0, ()),) if scores else ()
            yield Chunk((token,), self._tokenizer.decode_bytes([token]), scored)
        cut = limit is not None and limit < len(ids)
        yield Ended(reason="length" if cut else "stop", cached_tokens=0)

    def load(self) -> tuple[int, int]:
        """Return how many requests are running and waiting."""
        return self.open, 0

    def healthy(self) -> bool:
        """Return whether requests can be served now."""
        return True

    async def close(self) -> None:
        """End everything."""

"""A backend without a network: a function that reads the conversation and says the next turn."""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from hadal.backends import Chunk, Ended, Event, Generation
from hadal.chat import AssistantMessage, UserMessage
from hadal.encoding import Encoding
from hadal.encoding.tokens import ASSISTANT, EOS, USER

__all__ = ["Policy", "PolicyBackend", "Seen"]

_RESULT = "<tool_result>"


@dataclass(frozen=True)
class Seen:
    """What a policy knows.

    Attributes:
        asked: What the user said last.
        results: What the tools returned since, oldest first.
    """

    asked: str
    results: tuple[str, ...]


Policy = Callable[[Seen], AssistantMessage]


class PolicyBackend:
    """Speaks for a policy, in the format of the model and in one piece.

    Args:
        policy: What it says.
        encoding: The format, with the tokenizer.
    """

    max_model_len = 1 << 20
    follows_grammars = False

    def __init__(self, policy: Policy, encoding: Encoding) -> None:
        self._policy = policy
        self._encoding = encoding
        self._open = 0

    async def ready(self) -> None:
        """Do nothing: `max_model_len` is known."""

    @asynccontextmanager
    async def generate(self, generation: Generation) -> AsyncGenerator[AsyncGenerator[Event]]:
        """Say the next turn; see `Backend.generate`."""
        self._open += 1
        try:
            yield self._say(generation)
        finally:
            self._open -= 1

    async def _say(self, generation: Generation) -> AsyncGenerator[Event]:
        said = self._policy(_seen(self._encoding.decode(generation.prompt_ids)))
        ids = self._reply_ids(said)
        yield Chunk(tuple(ids), self._encoding.tokenizer.decode_bytes(ids))
        yield Ended(reason="stop", cached_tokens=0)

    def _reply_ids(self, said: AssistantMessage) -> list[int]:
        asked = UserMessage("")
        settings = {"mode": "thinking", "drop_thinking": False}
        prompt = self._encoding.encode([asked], **settings)
        whole = self._encoding.encode([asked, said], generation_prompt=False, **settings)
        assert whole[: len(prompt)] == prompt
        return whole[len(prompt) :]

    def load(self) -> tuple[int, int]:
        """Return how many requests are running and waiting."""
        return self._open, 0

    def healthy(self) -> bool:
        """Return whether requests can be served now."""
        return True

    async def close(self) -> None:
        """End everything."""


def _seen(text: str) -> Seen:
    """Read a prompt back. Tasks spell no control tokens, so that splitting at them is safe here."""
    asked, results = "", list[str]()
    for turn in text.split(USER)[1:]:
        said = turn.split(ASSISTANT)[0].removesuffix(EOS)
        if said.startswith(_RESULT):
            for part in said.split(_RESULT)[1:]:
                results.append(part.split("</tool_result>")[0])
        else:
            asked, results = said, []
    return Seen(asked, tuple(results))

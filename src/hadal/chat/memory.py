"""Reasoning that clients lost between turns, put back.

Many clients rebuild the history from fields that they know, and what the model thought is gone: it
then sees itself calling tools without a thought, and the prefix cache breaks. A server remembers
each turn that it sends, by the ids of its calls and by the id of its response, and restores it.

Wrong reasoning is worse than none. So a turn is found only under its ids together with a digest of
what it says, both within one scope (a tenant), and two turns that agree in all of that but not in
the reasoning are never restored. What this cannot rule out: ids that repeat (`call_0`), the same
call, and the other turn never remembered or evicted. Servers should give out random ids.

Stores are bounded, and forget what was used least recently: `reasoning_stores`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hadal.chat.messages import AssistantMessage, Content, Message, TextPart
from hadal.chat.reasoning_stores import InMemoryStore, ReasoningStore, SQLiteStore

__all__ = ["InMemoryStore", "ReasoningMemory", "ReasoningStore", "Restored", "SQLiteStore"]


@dataclass(frozen=True, slots=True)
class Restored:
    """Messages with their reasoning.

    Attributes:
        messages: All of them; those that lacked nothing are the same objects.
        turns: Places of the messages whose reasoning was put back.
    """

    messages: tuple[Message, ...]
    turns: tuple[int, ...]


class ReasoningMemory:
    """Remembers what the model thought in each turn, for clients that do not send it back.

    Args:
        store: Where; in the memory of this process by default.
    """

    def __init__(self, store: ReasoningStore | None = None) -> None:
        self._store: ReasoningStore = InMemoryStore() if store is None else store

    def remember(
        self, message: AssistantMessage, *, response_id: str | None = None, scope: str = ""
    ) -> bool:
        """Keep the reasoning of a turn.

        Args:
            message: The turn as the client gets it, ids of calls included.
            response_id: Of a client that names the response of each turn (Responses API).
            scope: Whose it is; nothing is found across scopes.

        Returns:
            Whether there was anything to keep: reasoning, and an id to find it by.

        Raises:
            StorageError: The store cannot be written.
        """
        slots = _slots(message, response_id, scope)
        if message.reasoning_content is None or not slots:
            return False
        self._store.save(slots, message.reasoning_content)
        return True

    def restore(
        self,
        messages: Sequence[Message],
        *,
        response_ids: Mapping[int, str] | None = None,
        scope: str = "",
    ) -> Restored:
        """Put back the reasoning of turns that lost it.

        Lost is None, but also blank text: some proxies replace it by "" or " " to satisfy a check
        for presence, and such a placeholder shows the model that it thought nothing. Where nothing
        is remembered the message stays as it is.

        Args:
            messages: A history from a client.
            response_ids: Response of each turn, by its place in `messages`, where known.
            scope: Whose it is.

        Raises:
            StorageError: The store cannot be read.
        """
        known = response_ids or {}
        wanted = {
            place: _slots(message, known.get(place), scope)
            for place, message in enumerate(messages)
            if isinstance(message, AssistantMessage)
            and not (message.reasoning_content or "").strip()
        }
        slots = [slot for group in wanted.values() for slot in group]
        found = self._store.load(slots) if slots else {}
        result = list(messages)
        turns: list[int] = []
        for place, group in wanted.items():
            reasoning = next((found[slot] for slot in group if slot in found), None)
            message = result[place]
            assert isinstance(message, AssistantMessage)
            if reasoning is not None and reasoning != message.reasoning_content:
                result[place] = replace(message, reasoning_content=reasoning)
                turns.append(place)
        return Restored(tuple(result), tuple(turns))

    def close(self) -> None:
        """Close the store."""
        self._store.close()


def _slots(message: AssistantMessage, response_id: str | None, scope: str) -> list[str]:
    """Where the reasoning of a turn may stand, the surest first; none without any id."""
    ids = [call.id for call in message.tool_calls]
    keys: list[list[Any]] = [] if response_id is None else [["response", response_id]]
    if any(call_id is not None for call_id in ids):
        keys.append(["calls", ids])
    if not keys:
        return []
    digest = _digest(
        [
            _plain(message.content),
            [[call.name, _normal_arguments(call.arguments)] for call in message.tool_calls],
        ]
    )
    return [_digest([scope, key, digest]) for key in keys]


def _digest(value: Any) -> str:
    # As JSON, so that no two values have the same bytes; ASCII takes lone surrogates too.
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()


def _plain(content: Content) -> Any:
    """Content without what clients change in passing: the form of its text, and blank ends."""
    if isinstance(content, str):
        return content.strip()
    if all(isinstance(part, TextPart) for part in content):
        return "\n\n".join(part.text for part in content if isinstance(part, TextPart)).strip()
    return [
        [type(part).__name__, part.text if isinstance(part, TextPart) else part.url]
        for part in content
    ]


def _normal_arguments(text: str) -> list[Any]:
    """Arguments without spacing and order of keys, and 1.0 as 1, as JavaScript writes it."""
    try:
        value = json.loads(text, parse_float=_number)
        return ["json", json.dumps(value, sort_keys=True)]
    except (ValueError, RecursionError):
        return ["text", text]


def _number(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value

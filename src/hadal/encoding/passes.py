"""The three passes over the messages before they are rendered: merge, sort, drop.

They work on messages as plain dicts with the reference's keys (role, content, tools, tool_calls,
reasoning_content, task, wo_eos, ...), because in the strict face whether a key is there at all
changes the result.
"""

from collections.abc import Sequence
from typing import Any

__all__ = ["drop_reasoning", "has_tools", "last_user_index", "merge", "sort_results"]

Dict = dict[str, Any]

_KEPT_KEYS = ("task", "wo_eos", "mask")
_SURVIVING_ROLES = frozenset({"user", "system", "tool", "latest_reminder", "direct_search_results"})


def merge(messages: Sequence[Dict]) -> list[Dict]:
    """Gather consecutive user texts and tool results into user turns made of blocks.

    A user text does not join a turn that carries a task; a tool result does.
    """
    merged: list[Dict] = []
    for message in messages:
        role = message.get("role")
        last = merged[-1] if merged and merged[-1].get("role") == "user" else None
        if role == "tool":
            block: Dict = {
                "type": "tool_result",
                "id": message.get("tool_call_id", ""),
                "content": message.get("content") or "",
            }
            if last is None:
                merged.append({"role": "user", "blocks": [block]})
            else:
                last["blocks"].append(block)
        elif role == "user":
            block = {"type": "text", "text": message.get("content", "")}
            if last is None or last.get("task") is not None:
                kept = {key: message[key] for key in _KEPT_KEYS if key in message}
                merged.append({"role": "user", "blocks": [block], **kept})
            else:
                last["blocks"].append(block)
        else:
            merged.append(dict(message))
    return merged


def sort_results(messages: list[Dict]) -> list[Dict]:
    """Put the tool results of each turn into the order of the calls that they answer, in place.

    The order is that of the latest assistant message with calls; a result whose id is not among
    them counts as position 0, and texts between results keep their slots.
    """
    order: dict[Any, int] = {}
    for message in messages:
        calls = message.get("tool_calls")
        if message.get("role") == "assistant" and calls:
            order = {}
            for position, call in enumerate(calls):
                call_id = call.get("id") or (call.get("function") or {}).get("id")
                if call_id:
                    order[call_id] = position
        elif message.get("role") == "user" and order:
            _sort_blocks(message["blocks"], order)
    return messages


def _sort_blocks(blocks: list[Dict], order: dict[Any, int]) -> None:
    slots = [i for i, block in enumerate(blocks) if block["type"] == "tool_result"]
    if len(slots) < 2:
        return
    results = sorted((blocks[i] for i in slots), key=lambda block: order.get(block["id"], 0))
    for slot, block in zip(slots, results, strict=True):
        blocks[slot] = block


def has_tools(messages: Sequence[Dict]) -> bool:
    """Whether any message declares tools: reasoning is then kept for ever."""
    return any(message.get("tools") for message in messages)


def last_user_index(messages: Sequence[Dict], *, system_is_user: bool = False) -> int:
    """Index of the last user or developer turn, -1 if there is none.

    Args:
        messages: Merged, so that a tool result is a user turn.
        system_is_user: A system message after the first counts too (V4.1).
    """
    roles = ("user", "developer", "system") if system_is_user else ("user", "developer")
    for index in range(len(messages) - 1, -1, -1):
        role = messages[index].get("role")
        if role in roles and not (role == "system" and index == 0):
            return index
    return -1


def drop_reasoning(messages: Sequence[Dict], *, last_user: int) -> list[tuple[int, Dict]]:
    """Drop what a new user turn makes obsolete when no tools are declared.

    Before the last user turn, reasoning goes, and so do developer messages and unknown roles.

    Returns:
        What remains, each with its index in `messages`.
    """
    kept: list[tuple[int, Dict]] = []
    for index, message in enumerate(messages):
        role = message.get("role")
        if index >= last_user or role in _SURVIVING_ROLES:
            kept.append((index, message))
        elif role == "assistant":
            without = {k: v for k, v in message.items() if k != "reasoning_content"}
            kept.append((index, without))
    return kept

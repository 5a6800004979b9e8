"""What of the context goes to what: tokens by part, so that one sees what fills the window."""

from collections.abc import Mapping, Sequence

from hadal.chat import Message, ToolMessage

__all__ = ["described", "prompt_parts", "reply_parts"]


def prompt_parts(new: int, messages: Sequence[Message], instructions: int | None) -> dict[str, int]:
    """Return what new tokens of a prompt are.

    Args:
        new: How many there are.
        messages: That they come from; a note of the harness behind results counts with them.
        instructions: Those of the system's text and the tools, where they are among them: then all is new.

    Returns:
        Tokens by part: `instructions`, `user`, `results`; `earlier` for messages that were told anew.
    """
    if instructions is None:
        results = any(isinstance(message, ToolMessage) for message in messages)
        return {"results" if results else "user": new}
    return {"instructions": instructions, "user" if len(messages) == 1 else "earlier": new - instructions}  # fmt: skip


def reply_parts(ids: Sequence[int], *, reasons: bool, think_end: int, dsml: int) -> dict[str, int]:
    """Return what the tokens of a reply are: `reasoning`, `answers`, `calls`.

    Args:
        ids: The reply.
        reasons: Whether it begins with reasoning.
        think_end: Token that ends it.
        dsml: Token that a call begins with.
    """
    thought = 0
    if reasons:
        thought = ids.index(think_end) + 1 if think_end in ids else len(ids)
    called = ids.index(dsml, thought) if dsml in ids[thought:] else len(ids)
    found = {"reasoning": thought, "answers": called - thought, "calls": len(ids) - called}
    return {part: count for part, count in found.items() if count}


def described(parts: Mapping[str, int], window: int | None) -> str:
    """Return in words how full the context is, and of what."""
    total = sum(parts.values())
    share = f", {total / window:.1%} of {window:,}" if window else ""
    return f"{total:,} tokens{share}: " + ", ".join(f"{p} {n:,}" for p, n in parts.items())

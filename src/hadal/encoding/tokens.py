"""Control tokens: the spellings that mean something to the model, as a type of their own.

A rendered prompt is a list of strings. Those of type `Control` were written by the renderer and
become one token id each; all others are text, from whoever it came, and can never become one.
"""

import re
from typing import Final

from hadal.encoding import tags

__all__ = [
    "ACTION",
    "ASSISTANT",
    "BOS",
    "DSML",
    "EOS",
    "EXTRACTED_URL",
    "IMAGE",
    "LATEST_REMINDER",
    "SYSTEM",
    "TASKS",
    "THINK_END",
    "THINK_START",
    "USER",
    "Control",
    "split_trusted",
]


class Control(str):
    """The spelling of a control token, written by us."""

    __slots__ = ()


BOS: Final = Control("<｜begin▁of▁sentence｜>")
EOS: Final = Control("<｜end▁of▁sentence｜>")
USER: Final = Control("<｜User｜>")
ASSISTANT: Final = Control("<｜Assistant｜>")
SYSTEM: Final = Control("<｜System｜>")
"""V4.1 only; to the V4 tokenizer it is ordinary text."""
IMAGE: Final = Control("<｜deepseek_image｜>")
"""V4.1 only."""
LATEST_REMINDER: Final = Control("<｜latest_reminder｜>")
THINK_START: Final = Control("<think>")
THINK_END: Final = Control("</think>")
DSML: Final = Control(tags.DSML)
ACTION: Final = Control("<｜action｜>")
EXTRACTED_URL: Final = Control("<｜extracted_url｜>")

TASKS: Final = {
    "action": ACTION,
    "query": Control("<｜query｜>"),
    "authority": Control("<｜authority｜>"),
    "domain": Control("<｜domain｜>"),
    "title": Control("<｜title｜>"),
    "read_url": Control("<｜read_url｜>"),
}

_IN_TEMPLATES = re.compile(f"({DSML}|{THINK_START}|{THINK_END})")


def split_trusted(template: str) -> list[str]:
    """Split text that we wrote into text and control tokens. Never call it on anybody else's."""
    pieces = _IN_TEMPLATES.split(template)
    return [Control(p) if i % 2 else p for i, p in enumerate(pieces) if p]

"""What an agent is told before the user speaks."""

from typing import Final

__all__ = ["SYSTEM_PROMPT"]

SYSTEM_PROMPT: Final = "You work in a Linux box, with the tools below, until what the user asks for is done. Then answer shortly."

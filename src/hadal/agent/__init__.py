"""The agent: a model, its tools, and the loop between them."""

from hadal.agent.prompt import SYSTEM_PROMPT

__all__ = ["SYSTEM_PROMPT"]

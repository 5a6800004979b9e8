"""The agent: a model, its tools, and the loop between them.

`Agent.run` works until there is a `StopReason`; everything that happens is in its `Journal` before
anybody acts on it, so that a run that was killed goes on where it was.
"""

from hadal.agent.agent import Agent, AgentConfig
from hadal.agent.journal import Journal, read_events
from hadal.agent.prompt import SYSTEM_PROMPT
from hadal.agent.stop import Ending, Limits, Outcome, StopReason
from hadal.agent.trajectory import Trajectory

__all__ = [
    "SYSTEM_PROMPT",
    "Agent",
    "AgentConfig",
    "Ending",
    "Journal",
    "Limits",
    "Outcome",
    "StopReason",
    "Trajectory",
    "read_events",
]

"""Where completions come from: our engine, another server, or a script, behind one seam.

This module needs neither torch nor HTTP; each backend is in a module of its own.
"""

from hadal.backends.backend import (
    Backend,
    CallGrammar,
    Chunk,
    Ended,
    Event,
    Generation,
    LogprobChoice,
    Prefill,
    TokenLogprob,
)

__all__ = [
    "Backend",
    "CallGrammar",
    "Chunk",
    "Ended",
    "Event",
    "Generation",
    "LogprobChoice",
    "Prefill",
    "TokenLogprob",
]

"""Token ids in, token ids out: scheduler, hybrid cache, sampler, speculation. Never sees a message.

Start with `LLM` (llm.py) to use it and with `Engine.step` (engine.py) to read it: the scheduler makes
a plan, the stepper runs it, the hybrid cache keeps what can be used again.
"""

from hadal.engine.completion import Completion, FinishReason, PrefixUse, TokenLogprobs, Update
from hadal.engine.engine import Engine
from hadal.engine.engine_config import EngineConfig, WindowPolicy
from hadal.engine.launch import open_engine
from hadal.engine.llm import LLM
from hadal.engine.memory import MemoryPlan
from hadal.engine.sampling_params import Constraint, SamplingParams
from hadal.engine.step_log import Replayed, replay_step

__all__ = [
    "LLM",
    "Completion",
    "Constraint",
    "Engine",
    "EngineConfig",
    "FinishReason",
    "MemoryPlan",
    "PrefixUse",
    "Replayed",
    "SamplingParams",
    "TokenLogprobs",
    "Update",
    "WindowPolicy",
    "open_engine",
    "replay_step",
]

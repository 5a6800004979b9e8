"""What a V4 network is, in numbers: one frozen dataclass, its presets, and the upstream's JSON.

No torch here: capacity planning and an agent's context budget need these numbers on machines that
never run the model. `hadal.model` re-exports `ModelConfig`.
"""

from hadal.config.model import LayerKind, ModelConfig, WeightQuantization, YarnScaling
from hadal.config.upstream import read_config, to_upstream

__all__ = [
    "LayerKind",
    "ModelConfig",
    "WeightQuantization",
    "YarnScaling",
    "read_config",
    "to_upstream",
]

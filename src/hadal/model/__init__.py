"""DeepSeek-V4 in readable, eager PyTorch: the specification of every faster form.

Start with `Transformer` (transformer.py); docs/reading-the-model.md walks the report section by
section to the code. Nothing here reads files (`hadal.checkpoint`) or sees a message.
"""

from hadal.config import LayerKind, ModelConfig
from hadal.model.cache import LayerCache, SequenceCache, Slot, Snapshot
from hadal.model.initialize import initialize, randomize
from hadal.model.precision import Precision
from hadal.model.sequences import logits
from hadal.model.sharding import Shard
from hadal.model.trace import Trace
from hadal.model.training import TrainingOutput, training_forward
from hadal.model.transformer import Transformer

__all__ = [
    "LayerCache",
    "LayerKind",
    "ModelConfig",
    "Precision",
    "SequenceCache",
    "Shard",
    "Slot",
    "Snapshot",
    "Trace",
    "TrainingOutput",
    "Transformer",
    "initialize",
    "logits",
    "randomize",
    "training_forward",
]

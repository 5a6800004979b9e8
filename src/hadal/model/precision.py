"""Which roundings of the published model a forward pass simulates.

Each switch stands for one place where the publisher's code computes or stores in fewer bits
(spec/model.md 3, 8.1), so that its effect can be measured alone: `benchmarks/precision_error.py`.
"""

from dataclasses import dataclass

from hadal.config import ModelConfig

__all__ = ["Precision"]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Switches of simulated precision; all off is exact in the dtype of the model."""

    activations_fp8: bool = False
    """Inputs of FP8 and FP4 matrices in E4M3, 1x128 blocks (3.2)."""
    kv_fp8: bool = False
    """Window keys and compressed entries in FP8 + BF16 (3.3)."""
    index_hadamard: bool = False
    """Rotate indexer queries and keys; cancels exactly, changes only what FP4 does (2.8)."""
    index_fp4: bool = False
    """Indexer queries and keys in FP4 (3.3)."""
    index_scores_bf16: bool = False
    """Indexer scores and their sum over heads in BF16 (2.8)."""
    expert_weights_fp4: bool = False
    """Round plain expert weights to FP4 with a straight-through gradient (7.2)."""
    linear_weights_fp8: bool = False
    """Round the other plain matrices that are stored in FP8, straight-through; scales as the
    config stores them."""
    gate_float32: bool = True
    """Router logits in float32; transformers takes the activation dtype."""
    mhc_float32: bool = True
    """mHC's mixing of streams in float32; transformers casts the coefficients to the activation
    dtype before it."""

    @classmethod
    def exact(cls) -> "Precision":
        """Return the mathematics of the report, without any simulated rounding."""
        return cls()

    @classmethod
    def published(cls) -> "Precision":
        """Return the quantisations of the publisher's inference code with a quantised checkpoint.

        Its roundings to BF16 come with a BF16 model, but for two: it also rounds the attention
        probabilities before they meet the values, and the query norm's intermediate.
        """
        return cls(
            activations_fp8=True,
            kv_fp8=True,
            index_hadamard=True,
            index_fp4=True,
            index_scores_bf16=True,
        )

    @classmethod
    def transformers(cls) -> "Precision":
        """Return what transformers computes: no simulation, lower-precision gate and mHC."""
        return cls(gate_float32=False, mhc_float32=False)

    @classmethod
    def of(cls, config: ModelConfig) -> "Precision":
        """Return `published()` for a config with quantised weights, `exact()` for one without."""
        return cls.exact() if config.quantization_config is None else cls.published()

"""One transformer block: attention and MoE, each between an mHC read and write (spec 2.1, 2.2)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hadal.config import LayerKind, ModelConfig
from hadal.model import mhc
from hadal.model.attention import Attention
from hadal.model.batch import RaggedBatch
from hadal.model.cache import LayerCache
from hadal.model.kernels.mixing import mhc_read, mhc_write
from hadal.model.linear import Formats
from hadal.model.moe import MoE
from hadal.model.norm import RMSNorm
from hadal.model.trace import Trace
from hadal.model.training_mhc import training_read, training_write

__all__ = ["Block"]


class Block(nn.Module):
    """A block of any kind. There is no residual connection but the four streams."""

    def __init__(
        self, config: ModelConfig, name: str, kind: LayerKind, *, hashed: bool, formats: Formats
    ) -> None:
        super().__init__()
        self.config = config
        self.mhc_float32 = formats.precision.mhc_float32
        self.attn = Attention(config, name, kind, formats)
        self.ffn = MoE(config, name, hashed=hashed, formats=formats)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, formats.dtype)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, formats.dtype)
        for site in ("attn", "ffn"):
            for name, shape in mhc.site_shapes(config).items():
                parameter = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
                self.register_parameter(f"hc_{site}_{name}", parameter)

    def _read(
        self, site: str, streams_TMD: Tensor, norm: RMSNorm, *, fast: bool
    ) -> tuple[Tensor, mhc.Mixture | Tensor]:
        """Return what a sub-layer reads, and the coefficients; those of a kernel are one tensor."""
        fn, base, scale = (getattr(self, f"hc_{site}_{n}") for n in ("fn", "base", "scale"))
        if fast:
            x_TD, mixture = training_read(streams_TMD, fn, base, scale, self.config)
            return norm(x_TD), mixture
        if self.mhc_float32:
            found = mhc_read(streams_TMD, fn, base, scale, self.config, norm=norm.weight)
            if found is not None:
                return found
        mix = mhc.mixture(streams_TMD, fn, base, scale, self.config)
        return norm(mhc.read(streams_TMD, mix)), mix

    def _write(
        self, streams_TMD: Tensor, y_TD: Tensor, mix: mhc.Mixture | Tensor, *, fast: bool
    ) -> Tensor:
        if isinstance(mix, Tensor):
            return mhc_write(streams_TMD, y_TD, mix)
        if fast:
            return training_write(streams_TMD, y_TD, mix)
        return mhc.write(streams_TMD, y_TD, mix, in_float32=self.mhc_float32)

    def forward(
        self,
        streams_TMD: Float[Tensor, "T M D"],
        ids_T: Int[Tensor, " T"],
        batch: RaggedBatch,
        caches: list[LayerCache],
        trace: Trace | None,
    ) -> Float[Tensor, "T M D"]:
        """Return the streams after this block; token ids route the hash layers."""
        fast = trace is not None and trace.fast
        x_TD, mix = self._read("attn", streams_TMD, self.attn_norm, fast=fast)
        y_TD = self.attn(x_TD, batch, caches, trace)
        streams_TMD = self._write(streams_TMD, y_TD, mix, fast=fast)
        x_TD, mix = self._read("ffn", streams_TMD, self.ffn_norm, fast=fast)
        y_TD = self.ffn(x_TD, ids_T, batch, trace)
        return self._write(streams_TMD, y_TD, mix, fast=fast)

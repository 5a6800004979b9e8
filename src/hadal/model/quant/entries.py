"""What the cache stores: KV entries in FP8 + BF16, indexer keys in FP4 (spec/model.md 3.3, 3.4).

A KV entry is, in bytes: the un-rotated dims as E4M3, the rotated dims as BF16, one UE8M0 scale per
64 un-rotated dims, zero padding to a multiple of 8. With the published widths 448 + 128 + 7 + 1 =
584. An indexer key is its FP4 codes, then its scales: 64 + 4 = 68.

Shape letters: C entries, K head dim, R rotated dims, B bytes.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from hadal.model.quant.fp4 import FP4_BLOCK, dequantize_fp4, quantize_fp4, round_trip_fp4
from hadal.model.quant.fp8 import E4M3_MAX, round_trip_blocks
from hadal.model.quant.scales import decode_ue8m0, encode_ue8m0, power_of_two_scale
from hadal.model.quant.straight_through import straight_through

__all__ = [
    "dequantize_index_keys",
    "dequantize_kv_entries",
    "index_key_bytes",
    "kv_entry_bytes",
    "quantize_index_keys",
    "quantize_kv_entries",
    "round_trip_index_keys",
    "round_trip_kv_entries",
]

_BLOCK = 64
_AMAX_FLOOR = 1e-4


def kv_entry_bytes(head_dim: int, rope_dim: int) -> int:
    """Return the size of one stored KV entry."""
    plain = head_dim - rope_dim
    size = plain + 2 * rope_dim + -(-plain // _BLOCK)
    return size + -size % 8


def index_key_bytes(index_head_dim: int) -> int:
    """Return the size of one stored indexer key."""
    return index_head_dim // 2 + index_head_dim // FP4_BLOCK


def quantize_kv_entries(kv_CK: Float[Tensor, "C K"], rope_dim: int) -> UInt8[Tensor, "C B"]:
    """Pack KV entries (after RoPE) into their stored bytes."""
    plain = kv_CK.shape[1] - rope_dim
    blocks = F.pad(kv_CK[:, :plain].float(), (0, -plain % _BLOCK)).unflatten(1, (-1, _BLOCK))
    amax = blocks.abs().amax(dim=-1, keepdim=True).clamp_min(_AMAX_FLOOR)
    scale = power_of_two_scale(amax, E4M3_MAX)
    codes = (blocks / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    fields = (
        codes.flatten(1)[:, :plain].view(torch.uint8),
        kv_CK[:, plain:].to(torch.bfloat16).contiguous().view(torch.uint8),
        encode_ue8m0(scale.squeeze(-1)).view(torch.uint8),
    )
    packed = torch.cat(fields, dim=1)
    return F.pad(packed, (0, kv_entry_bytes(kv_CK.shape[1], rope_dim) - packed.shape[1]))


def dequantize_kv_entries(
    packed_CB: UInt8[Tensor, "C B"], head_dim: int, rope_dim: int
) -> Float[Tensor, "C K"]:
    """Return the float32 entries that stored bytes stand for."""
    plain = head_dim - rope_dim
    num_scales = -(-plain // _BLOCK)
    codes, rotated, scales, _ = packed_CB.split(
        (plain, 2 * rope_dim, num_scales, packed_CB.shape[1] - plain - 2 * rope_dim - num_scales),
        dim=1,
    )
    scale = decode_ue8m0(scales).repeat_interleave(_BLOCK, dim=1)[:, :plain]
    values = codes.contiguous().view(torch.float8_e4m3fn).float() * scale
    return torch.cat((values, rotated.contiguous().view(torch.bfloat16).float()), dim=1)


def round_trip_kv_entries(kv: Float[Tensor, "*rows K"], rope_dim: int) -> Float[Tensor, "*rows K"]:
    """Return what attention sees of entries kept in the stored format; straight-through gradient."""
    plain = kv.shape[-1] - rope_dim
    rounded = torch.cat(
        (
            round_trip_blocks(kv[..., :plain].detach(), _BLOCK),
            kv[..., plain:].detach().to(torch.bfloat16).to(kv.dtype),
        ),
        dim=-1,
    )
    return straight_through(kv, rounded)


def quantize_index_keys(key_CK: Float[Tensor, "C K"]) -> UInt8[Tensor, "C B"]:
    """Pack indexer keys (after RoPE and Hadamard) into their stored bytes."""
    codes, scale = quantize_fp4(key_CK)
    return torch.cat((codes.view(torch.uint8), scale.view(torch.uint8)), dim=1)


def dequantize_index_keys(packed_CB: UInt8[Tensor, "C B"]) -> Float[Tensor, "C K"]:
    """Return the float32 keys that stored bytes stand for."""
    num_codes = packed_CB.shape[1] * 16 // 17  # 16 bytes of codes for each byte of scale
    codes, scales = packed_CB[:, :num_codes], packed_CB[:, num_codes:]
    return dequantize_fp4(codes.contiguous(), scales)


def round_trip_index_keys(key: Float[Tensor, "*rows K"]) -> Float[Tensor, "*rows K"]:
    """Return what the indexer sees of FP4 queries or keys; straight-through gradient."""
    return straight_through(key, round_trip_fp4(key.detach()))

"""Reference quantisers: exact, readable, the specification of every fast form.

`scales` (power-of-two scales), `fp8` and `fp4` (weights and activations), `entries` (what the cache
stores), `hadamard`. Everything rounds to nearest, ties to even, by a real cast: simulations that
only clamp and rescale quantise nothing (spec T14).
"""

from hadal.model.quant.entries import (
    dequantize_index_keys,
    dequantize_kv_entries,
    index_key_bytes,
    kv_entry_bytes,
    quantize_index_keys,
    quantize_kv_entries,
    round_trip_index_keys,
    round_trip_kv_entries,
)
from hadal.model.quant.fp4 import dequantize_fp4, fake_quantize_fp4, fp4_to_fp8, quantize_fp4
from hadal.model.quant.fp8 import (
    dequantize_fp8,
    fake_quantize_fp8,
    quantize_fp8,
    round_trip_activations,
)
from hadal.model.quant.hadamard import hadamard
from hadal.model.quant.scales import decode_ue8m0, encode_ue8m0

__all__ = [
    "decode_ue8m0",
    "dequantize_fp4",
    "dequantize_fp8",
    "dequantize_index_keys",
    "dequantize_kv_entries",
    "encode_ue8m0",
    "fake_quantize_fp4",
    "fake_quantize_fp8",
    "fp4_to_fp8",
    "hadamard",
    "index_key_bytes",
    "kv_entry_bytes",
    "quantize_fp4",
    "quantize_fp8",
    "quantize_index_keys",
    "quantize_kv_entries",
    "round_trip_activations",
    "round_trip_index_keys",
    "round_trip_kv_entries",
]

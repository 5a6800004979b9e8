"""A network as a GGUF file for llama.cpp: routed experts in MXFP4, all else in float32.

llama.cpp takes V4's experts in no other format. The file has no vocabulary, so that the peer is given
token ids; MTP blocks are left out. Ours and its blocks of 32 FP4 values hold the same codes and the
same scale, in another order.
"""

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import torch
from torch import Tensor

from hadal.config import ModelConfig
from hadal.model import Transformer
from hadal.model.quant import quantize_fp4

__all__ = ["metadata", "mxfp4_blocks", "write_gguf"]

_ARCHITECTURE: Final = "deepseek4"
_ALIGNMENT: Final = 32
_SQRT_SOFTPLUS: Final = 4
"""llama.cpp's number of the gate's function."""

_NAMES: Final = {
    "embed.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
    "hc_head_fn": "output_hc_fn.weight",
    "hc_head_base": "output_hc_base.weight",
    "hc_head_scale": "output_hc_scale.weight",
}
_LAYER_NAMES: Final = {
    "attn_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attn.attn_sink": "attn_sinks",
    "attn.wq_a": "attn_q_a",
    "attn.q_norm": "attn_q_a_norm",
    "attn.wq_b": "attn_q_b",
    "attn.wkv": "attn_kv",
    "attn.kv_norm": "attn_kv_a_norm",
    "attn.wo_a": "attn_output_a",
    "attn.wo_b": "attn_output_b",
    "attn.compressor.wkv": "attn_compressor_kv",
    "attn.compressor.wgate": "attn_compressor_gate",
    "attn.compressor.ape": "attn_compressor_ape",
    "attn.compressor.norm": "attn_compressor_norm",
    "attn.indexer.wq_b": "indexer.attn_q_b",
    "attn.indexer.weights_proj": "indexer.proj",
    "attn.indexer.compressor.wkv": "indexer_compressor_kv",
    "attn.indexer.compressor.wgate": "indexer_compressor_gate",
    "attn.indexer.compressor.ape": "indexer_compressor_ape",
    "attn.indexer.compressor.norm": "indexer_compressor_norm",
    "ffn.gate": "ffn_gate_inp",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid",
    "ffn.shared_experts.w1": "ffn_gate_shexp",
    "ffn.shared_experts.w2": "ffn_down_shexp",
    "ffn.shared_experts.w3": "ffn_up_shexp",
}
_EXPERT_NAMES: Final = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}

_FLOAT32, _INT32, _MXFP4 = 0, 26, 39


class _Stored(NamedTuple):
    """A tensor as the file holds it; `shape` is in numbers, the tensor of MXFP4 in bytes."""

    name: str
    kind: int
    shape: tuple[int, ...]
    data: Tensor


def mxfp4_blocks(weight_OI: Tensor) -> Tensor:
    """Return the bytes of a matrix: blocks of a scale and 16 bytes, of which byte j has j and j + 16."""
    packed, scale = quantize_fp4(weight_OI)
    pairs = packed.view(torch.uint8).unflatten(-1, (-1, 16))
    codes = torch.stack((pairs & 0xF, pairs >> 4), dim=-1).flatten(-2)
    nibbles = codes[..., :16] | (codes[..., 16:] << 4)
    return torch.cat((scale.view(torch.uint8).unsqueeze(-1), nibbles), dim=-1).flatten(-2)


def write_gguf(model: Transformer, path: Path) -> None:
    """Write a model of plain floats.

    The experts are quantised as `Precision.expert_weights_fp4` simulates it.
    """
    tensors = list(_tensors(model))
    with path.open("wb") as file:
        fields = metadata(model.config)
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)))
        for key, value in fields.items():
            _write_string(file, key)
            _write_value(file, value)
        offset = 0
        for tensor in tensors:
            _write_string(file, tensor.name)
            dims = tensor.shape[::-1]
            head = (len(dims), *dims, tensor.kind, offset)
            file.write(struct.pack(f"<I{len(dims)}QIQ", *head))
            size = tensor.data.nbytes
            offset += size + -size % _ALIGNMENT
        for tensor in tensors:
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            file.write(tensor.data.contiguous().numpy().tobytes())
        file.write(b"\0" * (-file.tell() % _ALIGNMENT))


def metadata(config: ModelConfig) -> dict[str, Any]:
    """Return the fields that llama.cpp reads; whole numbers, floats, texts, or lists of them."""
    layers, width = config.num_hidden_layers, config.head_dim
    own: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "embedding_length_out": config.hidden_size * config.hc_mult,
        "block_count": layers,
        "feed_forward_length": config.moe_intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.sliding_window": config.sliding_window,
        "attention.indexer.head_count": config.index_n_heads,
        "attention.indexer.key_length": config.index_head_dim,
        "attention.indexer.top_k": config.index_topk,
        "attention.output_group_count": config.o_groups,
        "attention.output_lora_rank": config.o_lora_rank,
        "attention.compress_rope_freq_base": float(config.compress_rope_theta),
        "attention.compress_ratios": list(config.compress_ratios[:layers]),
        "rope.dimension_count": config.qk_rope_head_dim,
        "rope.freq_base": float(config.rope_theta),
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": 1,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": True,
        "expert_gating_func": _SQRT_SOFTPLUS,
        "swiglu_clamp_exp": [float(config.swiglu_limit)] * layers,
        "swiglu_clamp_shexp": [float(config.swiglu_limit)] * layers,
        "hyper_connection.count": config.hc_mult,
        "hyper_connection.sinkhorn_iterations": config.hc_sinkhorn_iters,
        "hyper_connection.epsilon": config.hc_eps,
        "hash_layer_count": config.num_hash_layers,
    }
    if (yarn := config.rope_scaling) is not None:
        own |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(yarn.factor),
            "rope.scaling.original_context_length": yarn.original_max_position_embeddings,
            "rope.scaling.yarn_beta_fast": float(yarn.beta_fast),
            "rope.scaling.yarn_beta_slow": float(yarn.beta_slow),
        }
    return {
        "general.architecture": _ARCHITECTURE,
        "general.alignment": _ALIGNMENT,
        "tokenizer.ggml.model": "none",
        **{f"{_ARCHITECTURE}.{key}": value for key, value in own.items()},
    }


def _tensors(model: Transformer) -> Iterator[_Stored]:
    state = model.state_dict()
    for name, tensor in state.items():
        if name.startswith("mtp.") or ".ffn.experts." in name:
            continue
        is_table = tensor.dtype == torch.int64
        kept = tensor.to(torch.int32 if is_table else torch.float32)
        kind = _INT32 if is_table else _FLOAT32
        yield _Stored(_name(name), kind, tuple(tensor.shape), kept)
    for layer in range(model.config.num_hidden_layers):
        for matrix, stacked in _EXPERT_NAMES.items():
            weights = [
                state[f"layers.{layer}.ffn.experts.{i}.{matrix}.weight"]
                for i in range(model.config.n_routed_experts)
            ]
            shape = (len(weights), *weights[0].shape)
            data = torch.stack([mxfp4_blocks(weight) for weight in weights])
            yield _Stored(f"blk.{layer}.{stacked}.weight", _MXFP4, shape, data)


def _name(official: str) -> str:
    """Return llama.cpp's name of a tensor that is not a routed expert's."""
    if official in _NAMES:
        return _NAMES[official]
    match = re.fullmatch(r"layers\.(\d+)\.(.+?)(\.weight)?", official)
    assert match is not None
    layer, part, _ = match.groups()
    if part == "ffn.gate.bias":
        return f"blk.{layer}.exp_probs_b.bias"
    if part.startswith("hc_"):
        return f"blk.{layer}.{part}.weight"
    return f"blk.{layer}.{_LAYER_NAMES[part]}.weight"


def _write_string(file: BinaryIO, text: str) -> None:
    data = text.encode()
    file.write(struct.pack("<Q", len(data)) + data)


_CODES: Final[dict[type, tuple[int, str]]] = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}
"""Number and layout of the types that metadata has; a text is 8, a list 9."""


def _write_value(file: BinaryIO, value: Any) -> None:
    if isinstance(value, str):
        file.write(struct.pack("<I", 8))
        _write_string(file, value)
    elif isinstance(value, list):
        code, layout = _CODES[type(value[0])]
        file.write(struct.pack("<IIQ", 9, code, len(value)))
        file.write(b"".join(struct.pack(layout, item) for item in value))
    else:
        code, layout = _CODES[type(value)]
        file.write(struct.pack("<I", code) + struct.pack(layout, value))

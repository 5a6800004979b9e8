"""Three dialects of tensor names, one per function (spec/model.md 4).

The official names are those of our modules. transformers has names of its own for its modules, and
writes a mixture of both when it saves. `to_official` reads all three; `to_transformers` writes the
module names, which `from_pretrained` takes as they are.
"""

import re
from typing import Final

__all__ = ["expert_stack", "to_official", "to_transformers"]

_TO_TRANSFORMERS: Final = (
    # (official, transformers), applied in this order to a name with a dot in front
    (r"^\.embed\.", ".embed_tokens."),
    (r"^\.hc_head_(fn|base|scale)$", r".hc_head.hc_\1"),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),
    (r"\.attn\.indexer\.compressor\.", ".attn.compressor.indexer."),
    (r"\.attn\.indexer\.weights_proj\.", ".attn.compressor.indexer.scorer.weights_proj."),
    (r"\.attn\.indexer\.wq_b\.", ".attn.compressor.indexer.q_b_proj."),
    (r"\.attn_sink$", ".sinks"),
    (r"\.ape$", ".position_bias"),
    (r"\.(compressor|indexer)\.norm\.", r".\1.kv_norm."),
    (r"\.wq_a\.", ".q_a_proj."),
    (r"\.wq_b\.", ".q_b_proj."),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.wgate\.", ".gate_proj."),
    (r"\.wo_a\.", ".o_a_proj."),
    (r"\.wo_b\.", ".o_b_proj."),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
    (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
    (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
    (r"(?<!_hc)\.scale$", ".weight_scale_inv"),
)

_TO_OFFICIAL: Final = (
    (r"^\.lm_head\.", ".head."),
    (r"^\.embed_tokens\.", ".embed."),
    (r"\.hc_head\.hc_(fn|base|scale)$", r".hc_head_\1"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.(attn|ffn)_hc\.(fn|base|scale)$", r".hc_\1_\2"),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.", ".ffn."),
    (r"\.attn\.norm\.", ".attn.kv_norm."),  # as transformers saves it
    (r"\.compressor\.indexer\.scorer\.", ".indexer."),
    (r"\.compressor\.indexer\.q_b_proj\.", ".indexer.wq_b."),
    (r"\.compressor\.indexer\.", ".indexer.compressor."),
    (r"\.compressor\.kv_norm\.", ".compressor.norm."),
    (r"\.sinks$", ".attn_sink"),
    (r"\.position_bias$", ".ape"),
    (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
    (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
    (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
    (r"\.q_a_proj\.", ".wq_a."),
    (r"\.q_b_proj\.", ".wq_b."),
    (r"\.kv_proj\.", ".wkv."),
    (r"\.gate_proj\.", ".wgate."),
    (r"\.o_a_proj\.", ".wo_a."),
    (r"\.o_b_proj\.", ".wo_b."),
    (r"\.q_a_norm\.", ".q_norm."),
    (r"\.gate\.e_score_correction_bias$", ".gate.bias"),
    (r"\.weight_scale_inv$", ".scale"),
)

_EXPERT: Final = re.compile(r"^(layers\.\d+\.ffn\.experts)\.(\d+)\.(w[123])\.(weight|scale)$")


def _rewrite(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    name = f".{name}"
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name[1:]


def to_official(name: str) -> str:
    """Return the official name of a tensor in any dialect; official names are left alone.

    Stacked experts keep `experts.gate_up_proj` or `experts.down_proj` and are split by the reader.
    """
    return _rewrite(name.removeprefix("model."), _TO_OFFICIAL)


def to_transformers(name: str) -> str:
    """Return transformers' module name of a tensor that is not a routed expert's.

    MTP tensors keep their official names: transformers skips them, and nothing is lost.
    """
    if name.startswith("mtp."):
        return name
    if name == "head.weight":
        return "lm_head.weight"
    return "model." + _rewrite(name, _TO_TRANSFORMERS)


def expert_stack(name: str) -> str | None:
    """Return the stacked transformers tensor that a routed expert's tensor is part of, or None."""
    match = _EXPERT.match(name)
    if match is None:
        return None
    prefix, _, matrix, leaf = match.groups()
    stacked = "down_proj" if matrix == "w2" else "gate_up_proj"
    suffix = "_scale_inv" if leaf == "scale" else ""
    return f"model.{_rewrite(prefix, _TO_TRANSFORMERS)}.{stacked}{suffix}"

"""The MTP block against an oracle of its own: transformers has none (spec 2.10, T8).

The oracle is one dense pass in float64, written from the equations with none of the model's
modules: full attention matrix, no blocks of queries, no cache.
"""

import math

import pytest
import torch

from hadal.model import Transformer, randomize
from tests.configs import CONFIGS


def rms(x, weight=None):
    y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return y if weight is None else y * weight


def rope(x, positions, theta, width, sign=1):
    """Multiply pairs of the last `width` channels, as complex numbers, by exp(i p f)."""
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = sign * positions.double()[:, None] * frequency
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_complex(x[..., -width:].reshape(*x.shape[:-1], -1, 2).contiguous())
    turned = torch.view_as_real(pairs * turn.reshape(len(positions), *[1] * (x.ndim - 2), -1))
    return torch.cat((x[..., :-width], turned.flatten(-2)), -1)


def site(state, name, streams, config):
    n = config.hc_mult
    v = streams.flatten(1)
    mix = (v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ state[f"{name}_fn"].T
    base, scale = state[f"{name}_base"], state[f"{name}_scale"]
    pre = torch.sigmoid(mix[:, :n] * scale[0] + base[:n]) + 1e-6
    post = 2 * torch.sigmoid(mix[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = (mix[:, 2 * n :] * scale[2] + base[2 * n :]).reshape(-1, n, n).softmax(-1) + 1e-6
    comb = comb / (comb.sum(1, keepdim=True) + 1e-6)
    for _ in range(config.hc_sinkhorn_iters - 1):
        comb = comb / (comb.sum(2, keepdim=True) + 1e-6)
        comb = comb / (comb.sum(1, keepdim=True) + 1e-6)
    return (pre[..., None] * streams).sum(1), post, comb


def swiglu(state, prefix, x, limit):
    gate = (x @ state[f"{prefix}.w1.weight"].T).clamp(max=limit)
    up = (x @ state[f"{prefix}.w3.weight"].T).clamp(-limit, limit)
    return (gate / (1 + torch.exp(-gate)) * up) @ state[f"{prefix}.w2.weight"].T


def mtp_oracle(state, config, streams, embedded):
    t, heads, width = len(streams), config.num_attention_heads, config.head_dim
    positions = torch.arange(t)
    z = (rms(embedded, state["enorm.weight"]) @ state["e_proj.weight"].T)[:, None]
    z = z + rms(streams, state["hnorm.weight"]) @ state["h_proj.weight"].T

    u, post, comb = site(state, "hc_attn", z, config)
    x = rms(u, state["attn_norm.weight"])
    latent = rms(x @ state["attn.wq_a.weight"].T, state["attn.q_norm.weight"])
    q = rms((latent @ state["attn.wq_b.weight"].T).reshape(t, heads, width))
    q = rope(q, positions, config.rope_theta, config.qk_rope_head_dim)
    k = rms(x @ state["attn.wkv.weight"].T, state["attn.kv_norm.weight"])
    k = rope(k, positions, config.rope_theta, config.qk_rope_head_dim)
    distance = positions[:, None] - positions
    hidden = (distance < 0) | (distance >= config.sliding_window)
    logit = torch.einsum("thk,sk->hts", q, k) / math.sqrt(width)
    exponential = torch.exp(logit.masked_fill(hidden, float("-inf")))
    sink = torch.exp(state["attn.attn_sink"])[:, None, None]
    o = torch.einsum("hts,sk->thk", exponential / (exponential.sum(-1, keepdim=True) + sink), k)
    o = rope(o, positions, config.rope_theta, config.qk_rope_head_dim, sign=-1)
    groups = config.o_groups
    wo_a = state["attn.wo_a.weight"].reshape(groups, config.o_lora_rank, -1)
    o = torch.einsum("tgi,goi->tgo", o.reshape(t, groups, -1), wo_a).flatten(1)
    y = o @ state["attn.wo_b.weight"].T
    z = post[..., None] * y[:, None] + torch.einsum("tjk,tjd->tkd", comb, z)

    u, post, comb = site(state, "hc_ffn", z, config)
    x = rms(u, state["ffn_norm.weight"])
    score = torch.log1p(torch.exp(x @ state["ffn.gate.weight"].T)).sqrt()
    chosen = (score + state["ffn.gate.bias"]).topk(config.num_experts_per_tok).indices
    y = swiglu(state, "ffn.shared_experts", x, config.swiglu_limit)
    for token in range(t):
        weights = score[token, chosen[token]]
        weights = weights / weights.sum() * config.routed_scaling_factor
        for weight, expert in zip(weights, chosen[token].tolist(), strict=True):
            prefix = f"ffn.experts.{expert}"
            y[token] += weight * swiglu(state, prefix, x[token : token + 1], config.swiglu_limit)[0]
    return post[..., None] * y[:, None] + torch.einsum("tjk,tjd->tkd", comb, z)


def head(state, streams, head_weight):
    v = streams.flatten(1)
    mix = (v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ state["hc_head_fn"].T
    weights = torch.sigmoid(mix * state["hc_head_scale"] + state["hc_head_base"]) + 1e-6
    return rms((weights[..., None] * streams).sum(1), state["norm.weight"]) @ head_weight.T


@pytest.fixture(params=["flash_like", "pro_like", "odd"])
def model(request):
    model = Transformer(CONFIGS[request.param])
    randomize(model, 2)
    return model


@torch.no_grad()
def test_draft_equals_the_oracle(model):
    """Also in a Pro-like model, where no main layer is a plain window with theta 10000 (T6b)."""
    ids = torch.randint(0, model.config.vocab_size, (200,))
    streams = model.streams(ids[:-1], [199])
    state = {k: v.double() for k, v in model.mtp[0].state_dict().items()}
    embedded = model.embed.weight.double()[ids[1:]]
    expected = mtp_oracle(state, model.config, streams.double(), embedded)
    logits, drafted = model.draft(streams, ids[1:], [199])
    assert (drafted - expected).abs().max() < 1e-5
    expected_logits = head(state, expected, model.head.weight.double())
    assert (logits - expected_logits).abs().max() < 1e-5


@torch.no_grad()
def test_draft_in_chunks_and_batches(model):
    ids = torch.randint(0, model.config.vocab_size, (200,))
    streams = model.streams(ids[:-1], [199])
    whole = model.draft(streams, ids[1:], [199])[0]
    cache = model.new_draft_cache()
    parts = [
        model.draft(streams[a:b], ids[a + 1 : b + 1], [b - a], [cache])[0]
        for a, b in ((0, 1), (1, 130), (130, 131), (131, 199))
    ]
    assert (torch.cat(parts) - whole).abs().max() <= 1e-5
    twice = model.draft(torch.cat((streams, streams)), torch.cat((ids[1:], ids[1:])), [199, 199])
    assert (twice[0][199:] - whole).abs().max() <= 1e-5

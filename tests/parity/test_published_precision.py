"""`Precision.published()` against an oracle: one CSA layer with every rounding written out.

The oracle uses none of the model's quantisers. What is rounded, in which blocks and in which order
follows spec 2.4-2.8, 3.2 and 3.3; widths end in part of a block, and some tokens are so small that
the floors of the scales act. Accumulation orders differ, so now and then a value falls to the other
side of a rounding: the error may be small but not zero; a missing rounding is far larger.
"""

import dataclasses

import pytest
import torch

from hadal.config import LayerKind
from hadal.model import Precision, Transformer, randomize
from hadal.model.batch import RaggedBatch
from hadal.model.rope import rotate, rotation
from tests.configs import schedule

CONFIG = schedule(
    4,
    hidden_size=300,
    head_dim=176,  # 160 un-rotated: blocks of 64, 64, 32
    q_lora_rank=200,
    index_head_dim=64,
    index_n_heads=4,
    index_topk=6,
    o_lora_rank=150,
)
T = 96
TOLERANCE = 4e-3


def fp8(x, block, floor=1e-4):
    """E4M3 with a power-of-two scale per block of the last axis."""
    parts = []
    for part in x.split(block, dim=-1):
        amax = part.abs().amax(-1, keepdim=True).clamp_min(floor).double()
        scale = 2.0 ** torch.ceil(torch.log2(amax / 448))
        parts.append((part / scale).float().to(torch.float8_e4m3fn).double() * scale)
    return torch.cat(parts, -1).float()


def fp4(x):
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    parts = []
    for part in x.double().split(32, dim=-1):
        amax = part.abs().amax(-1, keepdim=True).clamp_min(6 * 2.0**-126)
        scale = 2.0 ** torch.ceil(torch.log2(amax / 6))
        nearest = (part.abs()[..., None] / scale[..., None] - grid).abs().argmin(-1)
        parts.append(part.sign() * grid[nearest] * scale)
    return torch.cat(parts, -1).float()


def hadamard(x):
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < x.shape[-1]:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return x @ matrix * x.shape[-1] ** -0.5


def stored(kv):
    """A cache entry: FP8 in blocks of 64, rotated channels BF16."""
    return torch.cat((fp8(kv[..., :-16], 64), kv[..., -16:].bfloat16().float()), -1)


def rms(x, weight=None):
    y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return y if weight is None else y * weight


def compressed(compressor, x):
    """Overlapping windows of 4; inputs and matrices are not quantised."""
    kv = x @ compressor.wkv.weight.T
    gate = x @ compressor.wgate.weight.T + compressor.ape.repeat(T // 4, 1)
    width = kv.shape[1] // 2
    entries = []
    for s in range(T // 4):
        now = slice(4 * s, 4 * s + 4)
        values, logits = [kv[now, width:]], [gate[now, width:]]
        if s:
            before = slice(4 * s - 4, 4 * s)
            values.append(kv[before, :width])
            logits.append(gate[before, :width])
        entries.append((torch.cat(logits).softmax(0) * torch.cat(values)).sum(0))
    normed = rms(torch.stack(entries), compressor.norm.weight)
    return rotate(normed, rotation(CONFIG, LayerKind.CSA, torch.arange(0, T, 4)))


def oracle(attention, x):
    angles = rotation(CONFIG, LayerKind.CSA, torch.arange(T))
    latent = rms(fp8(x, 128) @ attention.wq_a.weight.T, attention.q_norm.weight)
    q = rms((fp8(latent, 128) @ attention.wq_b.weight.T).unflatten(-1, (4, -1)))
    q = rotate(q, angles)
    k = stored(rotate(rms(fp8(x, 128) @ attention.wkv.weight.T, attention.kv_norm.weight), angles))
    entries = stored(compressed(attention.compressor, x))

    indexer = attention.indexer
    qi = (fp8(latent, 128) @ indexer.wq_b.weight.T).unflatten(-1, (4, -1))
    qi = fp4(hadamard(rotate(qi, angles))).bfloat16()
    ki = fp4(hadamard(compressed(indexer.compressor, x))).bfloat16()
    w = (x @ indexer.weights_proj.weight.T * 64**-0.5 * 4**-0.5).bfloat16()
    terms = torch.einsum("tik,ck->tic", qi, ki).relu() * w[..., None]
    scores = terms.sum(1).float()

    rows = []
    for t in range(T):
        far = sorted(range((t + 1) // 4), key=lambda c, t=t: (-scores[t, c].item(), c))[:6]
        keys = torch.cat((k[max(0, t - 15) : t + 1], entries[far]))
        e = torch.exp(q[t] @ keys.T * 176**-0.5)
        rows.append(e / (e.sum(-1, keepdim=True) + attention.attn_sink.exp()[:, None]) @ keys)
    o = rotate(torch.stack(rows), angles, inverse=True)
    wo_a = attention.wo_a.weight.unflatten(0, (2, -1))  # its input is not quantised
    z = torch.einsum("tgi,goi->tgo", o.flatten(1).unflatten(1, (2, -1)), wo_a).flatten(1)
    return fp8(z, 128) @ attention.wo_b.weight.T, scores


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model = Transformer(CONFIG, precision=Precision.published())
    randomize(model, 0)
    x = torch.randn(T, 300)
    x[10:20] *= 1e-6  # below the floor of the activation scales
    return model, x


def run(model, x):
    attention = model.blocks[0].attn
    batch = RaggedBatch.of(CONFIG, torch.zeros(T).long(), [T], [0])
    with torch.no_grad():
        return attention(x, batch, [attention.new_cache(x.device, x.dtype)], None)


def relative(actual, expected):
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


@torch.no_grad()
def test_one_csa_layer_with_every_rounding(case):
    model, x = case
    expected, _ = oracle(model.blocks[0].attn, x)
    assert relative(run(model, x), expected) < TOLERANCE


@torch.no_grad()
def test_each_rounding_matters_here(case):
    """The tolerance above would notice any one of them missing."""
    model, x = case
    expected, _ = oracle(model.blocks[0].attn, x)
    for name in ("activations_fp8", "kv_fp8", "index_fp4"):
        off = Transformer(
            CONFIG, precision=dataclasses.replace(Precision.published(), **{name: False})
        )
        off.load_state_dict(model.state_dict())
        assert relative(run(off, x), expected) > 3 * TOLERANCE, name


def test_what_published_switches_on():
    on = {f.name for f in dataclasses.fields(Precision) if getattr(Precision.published(), f.name)}
    assert on == {
        "activations_fp8",
        "kv_fp8",
        "index_hadamard",
        "index_fp4",
        "index_scores_bf16",
        "gate_float32",
        "mhc_float32",
    }
    assert Precision.of(CONFIG) == Precision.exact()
    quantised = schedule(4, index_head_dim=64).quantized("base")
    assert Precision.of(quantised) == Precision.published()

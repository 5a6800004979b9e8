"""Kernels of attention, indexer and experts beside what the modules say, on every kind of processor."""

import copy
import dataclasses
import pickle

import pytest
import torch

from hadal.config import LayerKind
from hadal.engine.block_pool import BLOCK_TOKENS
from hadal.engine.paged_cache import PagedEntries, SequenceBlocks
from hadal.engine.storage_format import storage_format
from hadal.model import ModelConfig, Precision, Transformer, kernels, quant, randomize
from hadal.model.cache import Entries
from hadal.model.core_attention import Keys, core_attention
from hadal.model.elementwise import silu
from hadal.model.indexer import Indexer
from hadal.model.kernels import native
from hadal.model.kernels.attention import native_attention, native_choice
from hadal.model.kernels.experts import native_swiglu
from hadal.model.kernels.vectors import native_vectors
from hadal.model.linear import Formats
from hadal.model.norm import rms_norm
from hadal.model.rope import rotate, rotation
from hadal.model.selection import Selection, all_visible, select_top_k

pytestmark = pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")

CONFIG = dataclasses.replace(ModelConfig.nano(), quantization_config=None)
DTYPES = [torch.float32, torch.bfloat16]


def levels():
    best = native.library().hadal_level() if native.library() else 0
    return [pytest.param(n, id=name) for n, name in enumerate(native.LEVELS[: best + 1])]


def close(dtype):
    return {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2e-2}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("at", levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [96, 40])
class TestVectors:
    def test_norm_and_rotation(self, at, dtype, width):
        config = dataclasses.replace(CONFIG, qk_rope_head_dim=16)
        x, weight = torch.randn(70, 3, width).to(dtype), torch.rand(width).to(dtype)
        angles = rotation(config, LayerKind.CSA, torch.arange(1000, 1070))
        with kernels.without_kernels():
            normed = (rms_norm(x.float(), 1e-6) * weight.float()).to(dtype)
            expected, back = rotate(normed, angles), rotate(x, angles, inverse=True)
        found = native_vectors(x, norm=1e-6, weight=weight, rotation=angles, at=at)
        torch.testing.assert_close(found, expected, **close(dtype))
        torch.testing.assert_close(
            native_vectors(x, rotation=angles, inverse=True, at=at), back, **close(dtype)
        )

    def test_rounding_as_the_cache_keeps_it(self, at, dtype, width):
        config = dataclasses.replace(CONFIG, qk_rope_head_dim=16)
        x = (torch.randn(70, width) * torch.logspace(-6, 6, 70)[:, None]).to(dtype)
        found = native_vectors(x, rotation=_still(config, 70), as_kept=True, at=at)
        assert torch.equal(found, quant.round_trip_kv_entries(x, 16))


def _still(config, tokens):
    half = config.qk_rope_head_dim // 2
    return torch.ones(tokens, half), torch.zeros(tokens, half)


def paged(rows, packing, dtype):
    """Return a store of rows on pages that lie in no order."""
    config = dataclasses.replace(CONFIG, head_dim=rows.shape[1], index_head_dim=rows.shape[1])
    config = dataclasses.replace(config, qk_rope_head_dim=16)
    stored = storage_format(packing, config, dtype, Precision.published())
    codec = stored.entries
    per_block = BLOCK_TOKENS // 4
    count = -(-rows.shape[0] // per_block)
    pages = torch.empty((count + 3, per_block, codec.width), dtype=codec.dtype)
    blocks = SequenceBlocks(torch.device("cpu"), torch.randperm(count + 3)[:count].tolist())
    store = PagedEntries(pages, codec, blocks, dtype, 0)
    store.append(rows)
    return store


@pytest.mark.parametrize("at", levels())
@pytest.mark.parametrize("packing", ["fp32", "bf16", "fp8-fp4", None])
@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize(("heads", "tokens"), [(8, 1), (5, 2), (3, 90)])
def test_attention(at, packing, chosen, heads, tokens):
    dtype = torch.bfloat16 if packing == "bf16" else torch.float32
    width, window, past, count = 32, 16, 300, 400
    visible = torch.arange(past, past + tokens)
    rows = torch.randn(count, width).to(dtype)
    if packing == "fp8-fp4":
        rows = quant.round_trip_kv_entries(rows, 16)
    if packing is None:
        store = Entries()
        store.append(rows)
    else:
        store = paged(rows, packing, dtype)
    selection = None
    if chosen:
        selection = select_top_k(torch.randn(tokens, count), visible, 40)
    keys = Keys(
        window_PK=torch.randn(window - 1 + tokens, width).to(dtype),
        window=window,
        entries=store,
        visible_T=visible,
        selection=selection,
        sink_H=torch.randn(heads),
        rotated=16,
    )
    q = (3 * torch.randn(tokens, heads, width)).to(dtype)
    with kernels.without_kernels():
        expected, _ = core_attention(q, keys)
    index = None if selection is None else selection.index_TS
    found = native_attention(
        q, keys.window_PK, window, store.pages(), visible, index, keys.sink_H, 16, at=at
    )
    torch.testing.assert_close(found, expected, **close(dtype))
    alone = native_attention(
        q[-1:], keys.window_PK, window, store.pages(), visible[-1:], None if index is None else index[-1:],
        keys.sink_H, 16, at=at,
    )  # fmt: skip
    assert torch.equal(alone, found[-1:])


@pytest.mark.parametrize("at", levels())
def test_attention_to_the_window_alone_and_at_the_start(at):
    q, window_PK, sink = torch.randn(20, 2, 16), torch.randn(20, 16), torch.randn(2)
    keys = Keys(
        window_PK=window_PK, window=7, entries=None, visible_T=torch.arange(20), selection=None, sink_H=sink
    )  # fmt: skip
    with kernels.without_kernels():
        expected, _ = core_attention(q, keys)
    found = native_attention(q, window_PK, 7, None, keys.visible_T, None, sink, 0, at=at)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_attention_of_narrow_heads_has_no_kernel():
    q = torch.randn(2, 2, 24)
    assert (
        native_attention(q, torch.randn(2, 24), 7, None, torch.arange(2), None, torch.randn(2), 0)
        is None
    )


@pytest.mark.parametrize("at", levels())
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(
    ("tokens", "past", "k"), [(1, 500, 64), (3, 70, 64), (100, 20, 64), (40, 2000, 300)]
)
def test_choice(at, rounded, tokens, past, k):
    """The set that the module chooses, but for entries whose scores are as good as equal."""
    count, heads, width = past + tokens, 5, 32
    visible = torch.arange(past + 1, past + tokens + 1)
    query, weight = torch.randn(tokens, heads, width), torch.randn(tokens, heads)
    store = Entries()
    store.append(torch.randn(count, width))
    formats = Formats(
        config=CONFIG, storage="plain", dtype=torch.float32,
        precision=dataclasses.replace(Precision.exact(), index_scores_bf16=rounded),
    )  # fmt: skip
    indexer = Indexer(CONFIG, formats)
    with kernels.without_kernels():
        expected, scores = indexer.choose(query, weight, store, visible, top_k=k, with_scores=False)
        scores = indexer._scores(query, weight, store.rows())
    assert expected is not None
    index = native_choice(
        query, weight, store.pages(), count, visible, k, in_bfloat16=rounded, at=at
    )
    found = Selection(index, all_visible(visible, index))
    assert found.index_TS.shape == expected.index_TS.shape
    assert torch.equal(found.valid_TS, expected.valid_TS)
    assert bool((found.index_TS.diff(dim=1) > 0).logical_or(~found.valid_TS[:, 1:]).all())
    near = 1e-4 if not rounded else 0.1
    for t in range(tokens):
        ours, theirs = (set(s.index_TS[t][s.valid_TS[t]].tolist()) for s in (found, expected))
        limit = scores[t][sorted(theirs)].min()
        assert all(abs(scores[t][n] - limit) < near for n in ours ^ theirs)


@pytest.mark.parametrize("at", levels())
def test_equal_scores_go_to_the_lowest(at):
    store = Entries()
    store.append(torch.ones(700, 16))
    visible = torch.tensor([600, 700])
    index = native_choice(
        torch.ones(2, 1, 16),
        torch.ones(2, 1),
        store.pages(),
        700,
        visible,
        50,
        in_bfloat16=False,
        at=at,
    )
    assert torch.equal(index, torch.arange(50).expand(2, -1))
    index = native_choice(
        -torch.ones(2, 1, 16),
        torch.ones(2, 1),
        store.pages(),
        700,
        visible,
        50,
        in_bfloat16=False,
        at=at,
    )
    assert torch.equal(index, torch.arange(50).expand(2, -1))


ORDERS = {
    "any": lambda count: torch.randperm(count, generator=torch.Generator().manual_seed(0)).float(),
    "rising": lambda count: torch.arange(count).float(),
    "falling": lambda count: -torch.arange(count).float(),
    "best where samples are": lambda count: torch.where(torch.arange(count) % 16 == 0, 9.0, 1.0),
    "few values": lambda count: (torch.arange(count) * 7 % 11).float(),
}


@pytest.mark.parametrize("at", levels())
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("count", "k"), [(1535, 64), (6000, 64), (9000, 512), (9000, 900)])
def test_choice_among_many(at, order, count, k):
    """The best of so many are looked for above what a sample says; the set is exact, whatever the sample."""
    scores = ORDERS[order](count)
    store = Entries()
    store.append(scores[:, None] * torch.tensor([1.0, -1.0] + 14 * [0.0]))
    query = torch.zeros(1, 2, 16)
    query[0, 0, 0] = query[0, 1, 1] = 1.0  # relu(score) - relu(-score)
    visible, weight = torch.tensor([count]), torch.tensor([[1.0, -1.0]])
    index = native_choice(query, weight, store.pages(), count, visible, k, in_bfloat16=False, at=at)
    assert index is not None
    expected = torch.sort(scores, descending=True, stable=True).indices[:k].sort().values
    assert torch.equal(index[0], expected)


@pytest.mark.parametrize("at", levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(at, dtype):
    gate, up, weight = (
        20 * torch.randn(9, 70).to(dtype),
        20 * torch.randn(9, 70).to(dtype),
        torch.rand(9),
    )
    expected = silu(gate.float().clamp(max=10)) * up.float().clamp(-10, 10)
    found = native_swiglu(gate, up, 10.0, None, at=at)
    torch.testing.assert_close(found, expected.to(dtype), **close(dtype))
    found = native_swiglu(gate, up, 10.0, weight, at=at)
    torch.testing.assert_close(found, (weight[:, None] * expected).to(dtype), **close(dtype))


def network(dtype=torch.float32, precision=None):
    model = Transformer(CONFIG, dtype=dtype, precision=precision or Precision.exact())
    randomize(model, 0)
    return model


class TestExperts:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("tokens", [1, 2, 60])
    @pytest.mark.parametrize("layer", [0, -1])
    def test_are_those_of_the_module(self, dtype, tokens, layer):
        """At once, step by step with a trace, and as the module says."""
        model = network(dtype)
        ffn, ids = model.blocks[layer].ffn, torch.randint(0, CONFIG.vocab_size, (tokens,))
        x = torch.randn(tokens, CONFIG.hidden_size).to(dtype)
        at_once = ffn(x, ids, None, None)
        routes, weights = ffn.gate.native_routes(x, ids, None)
        assert torch.equal(ffn._native(x, routes, weights), at_once)
        given = ffn.gate.native_routes(x, ids, routes)
        assert torch.equal(given[1], weights)
        with kernels.without_kernels():
            scores = ffn.gate.scores(x)
            assert torch.equal(ffn.gate.choose(scores, ids), routes)
            torch.testing.assert_close(
                ffn.gate.weights(scores, routes), weights, rtol=1e-5, atol=1e-6
            )
            torch.testing.assert_close(ffn(x, ids, None, None), at_once, **close(dtype))


class TestPlans:
    """One call stands for many modules only as long as they are what it was made for."""

    def pair(self, model, ids):
        with kernels.without_kernels():
            expected = model(ids, [len(ids)])
        return model(ids, [len(ids)]), expected

    def changes(self, change):
        model, ids = network(), torch.arange(3, 50)
        before, _ = self.pair(model, ids)
        change(model)
        after, expected = self.pair(model, ids)
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
        assert not torch.equal(before, after)

    def test_a_parameter_is_replaced(self):
        def change(model):
            attn = model.blocks[1].attn
            attn.wq_b.weight = torch.nn.Parameter(attn.wq_b.weight * 2)

        self.changes(change)

    def test_numbers_are_changed_where_they_lie(self):
        self.changes(lambda model: model.blocks[1].ffn.shared_experts.w1.weight.mul_(2))

    def test_data_is_replaced(self):
        def change(model):
            weight = model.blocks[2].ffn.shared_experts.w2.weight
            weight.data = weight.data * 2

        self.changes(change)

    def test_a_part_is_replaced(self):
        class Twice(torch.nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner
                self.fakes, self.out_features = True, inner.out_features

            def described(self):
                return None

            def forward(self, x):
                return 2 * self.inner(x)

        def change(model):
            attn = model.blocks[1].attn
            attn.wkv = Twice(attn.wkv)

        self.changes(change)

    def test_a_hook_is_called(self):
        model, seen = network(), []
        model(torch.arange(3, 9), [6])
        handle = model.blocks[0].attn.wq_a.register_forward_hook(lambda *_: seen.append(1))
        model(torch.arange(3, 9), [6])
        assert seen == [1]
        handle.remove()
        model(torch.arange(3, 9), [6])
        assert seen == [1]

    def test_copies_have_their_own(self):
        model, ids = network(), torch.arange(3, 50)
        before = model(ids, [47])
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other.blocks[0].attn.wkv.weight.mul_(3)
            assert torch.equal(model(ids, [47]), before)
            after, expected = self.pair(other, ids)
            torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)

    def test_gradients_have_none(self):
        model = network()
        with torch.enable_grad():
            model(torch.arange(3, 50), [47]).sum().backward()
        assert model.blocks[0].attn.wkv.weight.grad is not None


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_network_is_the_same_in_chunks(published, dtype):
    """With kernels a token has the same bits in a prefill, in chunks and decoded alone, in both dtypes."""
    model = network(dtype, Precision.published() if published else None)
    ids = torch.randint(3, CONFIG.vocab_size, (700,))
    whole = model(ids, [700])
    cache = model.new_cache()
    sizes = [300, 1, 1, 2, 33, 128, 1, 234]
    parts = [model(part, [len(part)], [cache]) for part in ids.split(sizes)]
    assert torch.equal(torch.cat(parts), whole)

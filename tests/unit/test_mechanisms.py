"""Single mechanisms against the numbers and traps of the specification."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from hadal.config import LayerKind, ModelConfig
from hadal.model import Precision, Trace, Transformer, kernels, mhc, randomize
from hadal.model.cache import Entries
from hadal.model.compressor import Tail, pool_windows
from hadal.model.core_attention import Keys, core_attention
from hadal.model.elementwise import sigmoid, silu, softmax, softplus
from hadal.model.indexer import index_scores
from hadal.model.linear import Formats, Linear, Role
from hadal.model.losses import balance_loss, indexer_loss
from hadal.model.moe import Expert
from hadal.model.product import product
from hadal.model.rope import inverse_frequencies, rotate, rotation
from hadal.model.selection import Selection
from tests.configs import CONFIGS, SMALL, schedule

SPEC = Path(__file__).parents[3] / "shared" / "spec" / "model-config.json"


def random_model(config, seed=0, **kwargs):
    model = Transformer(config, **kwargs)
    randomize(model, seed)
    return model


class TestRope:
    def test_published_frequencies(self):
        """T6: YaRN low 15, high 25; no amplitude factor."""
        flash = ModelConfig.v4_flash()
        frequencies = inverse_frequencies(64, 160_000.0, flash.rope_scaling)
        plain = inverse_frequencies(64, 160_000.0, None)
        assert torch.equal(frequencies[:16], plain[:16])
        assert torch.allclose(frequencies[25:], plain[25:] / 16)
        assert frequencies[16].item() == pytest.approx(0.0022656249, rel=1e-6)
        if SPEC.exists():
            expected = torch.tensor(json.loads(SPEC.read_text())["yarn_compress"]["inv_freq"])
            assert torch.allclose(frequencies, expected, rtol=1e-6)

    def test_window_only_layers_have_theta_10000_and_no_yarn(self):
        """T6b: also where the model's other layers have both; MTP blocks are such layers."""
        positions = torch.tensor([100_000])
        pro = ModelConfig.v4_pro()
        plain = torch.tensor([100_000.0]).unsqueeze(-1) * 10_000 ** (-torch.arange(0, 64, 2) / 64)
        assert torch.allclose(rotation(pro, LayerKind.SWA, positions)[0], plain.cos(), atol=2e-2)
        assert Transformer(schedule(128, 4)).mtp_blocks[0].attn.kind is LayerKind.SWA

    def test_rotates_adjacent_pairs_of_the_last_channels(self):
        config = SMALL  # 16 of 32 channels
        x = torch.randn(3, 32)
        turned = rotate(x, rotation(config, LayerKind.SWA, torch.tensor([0, 1, 7])))
        assert torch.equal(turned[:, :16], x[:, :16])
        assert torch.equal(turned[0], x[0])
        pair = torch.complex(x[1, 16], x[1, 17]) * torch.exp(torch.tensor(1j))
        assert torch.allclose(torch.view_as_real(pair), turned[1, 16:18], atol=1e-6)

    def test_inverse_and_norm(self):
        angles = rotation(SMALL, LayerKind.CSA, torch.arange(5))
        x = torch.randn(5, 4, 32)
        assert torch.allclose(rotate(rotate(x, angles), angles, inverse=True), x, atol=1e-6)
        assert torch.allclose(rotate(x, angles).norm(dim=-1), x.norm(dim=-1))


class TestMhc:
    def test_sinkhorn_columns_are_exact_and_rows_nearly(self):
        """Check 7 of the specification, with strong logits."""
        matrix = mhc.sinkhorn(torch.randn(500, 4, 4) * 5, 20, 1e-6)
        assert (matrix.sum(dim=1) - 1).abs().max() < 1e-5
        rows = (matrix.sum(dim=2) - 1).abs().max()
        assert 1e-5 < rows < 0.5

    def test_write_contracts_the_first_index(self):
        """T5: new stream k takes comb[j, k] of old stream j; the transpose loads, runs, degrades."""
        comb = torch.zeros(1, 4, 4)
        comb[0, 1, 2] = 1.0  # all of old stream 1 goes into new stream 2
        mix = mhc.Mixture(torch.zeros(1, 4), torch.zeros(1, 4), comb)
        streams = torch.arange(8.0).reshape(1, 4, 2)
        new = mhc.write(streams, torch.zeros(1, 2), mix, in_float32=True)
        assert torch.equal(new[0, 2], streams[0, 1])
        assert not new[0, [0, 1, 3]].any()


class TestCompressor:
    def pool(self, kv, gate, *, rate, overlap, cut):
        width = kv.shape[1] // (2 if overlap else 1)
        tail = Tail.fresh(rate, width, overlap=overlap, device=torch.device("cpu"))
        entries = []
        for part_kv, part_gate in zip(kv.split(cut), gate.split(cut), strict=True):
            entries.append(pool_windows(part_kv, part_gate, tail))
            tail = tail.advance(part_kv, part_gate)
        return torch.cat(entries), tail

    @pytest.mark.parametrize(("rate", "overlap"), [(4, True), (4, False), (128, False)])
    def test_any_cut_gives_the_same_entries(self, rate, overlap):
        kv, gate = torch.randn(2, 300, 12)
        whole, tail = self.pool(kv, gate, rate=rate, overlap=overlap, cut=300)
        assert whole.shape[0] == 300 // rate
        assert tail.kv.shape[0] == 300 % rate
        for cut in (1, 3, 4, 127, 128, 129):
            parts, end = self.pool(kv, gate, rate=rate, overlap=overlap, cut=cut)
            assert torch.equal(parts, whole)
            assert torch.equal(end.kv, tail.kv)

    def test_overlap_slots(self):
        """First half of the channels from the window before, second half from this one."""
        kv, gate = torch.randn(2, 12, 6)
        entries, _ = self.pool(kv, gate, rate=4, overlap=True, cut=12)
        logits = torch.cat((gate[4:8, :3], gate[8:12, 3:]))
        values = torch.cat((kv[4:8, :3], kv[8:12, 3:]))
        assert torch.allclose(entries[2], (logits.softmax(0) * values).sum(0), atol=1e-6)
        first = (gate[:4, 3:].softmax(0) * kv[:4, 3:]).sum(0)  # nothing before the first window
        assert torch.allclose(entries[0], first, atol=1e-6)

    def test_entries_are_rotated_at_the_first_token_of_their_window(self):
        """T6d: position s * m, not s."""
        model = random_model(schedule(128))
        compressor = model.blocks[0].attn.compressor
        kv, gate = torch.randn(2, 256, 32)
        entries, _ = compressor(kv, gate, compressor.fresh_tail(torch.device("cpu")), 3)
        pooled = pool_windows(kv, gate, compressor.fresh_tail(torch.device("cpu")))
        angles = rotation(model.config, LayerKind.HCA, torch.tensor([3 * 128, 4 * 128]))
        assert torch.equal(entries, rotate(compressor.norm(pooled), angles))


class TestIndexer:
    def test_scores_are_the_formula(self):
        """T7: ReLU before the signed head weights, a sum and not a mean."""
        q, w, k = torch.randn(5, 3, 8), torch.randn(5, 3), torch.randn(7, 8)
        expected = (w[:, :, None] * torch.einsum("tik,ck->tic", q, k).relu()).sum(1)
        assert torch.allclose(index_scores(q, w, k, in_bfloat16=False), expected, atol=1e-5)

    def test_bfloat16_scores_accumulate_in_float32(self):
        """64 heads summed one by one in BF16 would lose what the published reduction keeps."""
        q, w, k = torch.randn(9, 64, 32), torch.randn(9, 64), torch.randn(40, 32)
        terms = torch.einsum("tik,ck->tic", q.bfloat16(), k.bfloat16()).relu()
        expected = (terms * w.bfloat16()[:, :, None]).sum(dim=1).float()
        ours = index_scores(q, w, k, in_bfloat16=True)
        assert (ours == expected).float().mean() > 0.95

    @pytest.mark.parametrize("rotated", ["both", "query", "key"])
    def test_hadamard_on_both_sides_or_neither(self, rotated):
        """T7: one side alone changes the scores beyond all rounding."""
        plain = random_model(schedule(4, index_topk=4))
        turned = random_model(schedule(4, index_topk=4), precision=Precision(index_hadamard=True))
        indexer, other = plain.blocks[0].attn.indexer, turned.blocks[0].attn.indexer
        q, key, w = torch.randn(6, 16, 32), torch.randn(20, 32), torch.randn(6, 16)
        expected = index_scores(q, w, key, in_bfloat16=False)
        q = (other if rotated != "key" else indexer).simulate_storage(q)
        key = (other if rotated != "query" else indexer).simulate_storage(key)
        error = (index_scores(q, w, key, in_bfloat16=False) - expected).abs().max()
        assert error < 1e-4 if rotated == "both" else error > 1.0

    def test_hadamard_alone_changes_no_choice(self):
        """T7: it cancels between queries and keys wherever the model applies it."""
        config = schedule(4, index_topk=8)
        ids = torch.randint(0, 512, (400,))
        chosen = []
        for precision in (Precision.exact(), Precision(index_hadamard=True)):
            trace = Trace()
            random_model(config, precision=precision)(ids, [400], trace=trace)
            (selection,) = trace.selections["layers.0"]
            chosen.append(selection.index_TS)
        assert (chosen[0] == chosen[1]).all(dim=1).float().mean() > 0.98

    def test_early_queries_take_all_and_late_ones_topk(self):
        config = schedule(4, index_topk=5)
        model = random_model(config)
        trace = Trace()
        model(torch.randint(0, 512, (100,)), [100], trace=trace)
        (selection,) = trace.selections["layers.0"]
        counts = selection.valid_TS.sum(1)
        assert counts.tolist() == [min(5, (t + 1) // 4) for t in range(100)]


class TestAttention:
    def attend(self, t, window, entries, visible, sink, selection=None, past=0):
        heads = sink.shape[0]
        q = torch.randn(t, heads, 8)
        near = torch.randn(past + t, 8)
        store = None
        if entries is not None:
            store = Entries()
            store.append(entries)
        keys = Keys(near, window, store, visible, selection, sink)
        return q, near, core_attention(q, keys, entry_mass=True)

    @pytest.mark.parametrize("past", [0, 5, 15])
    def test_equals_the_formula(self, past):
        """Window of exactly `window` keys, itself included; sink in the denominator, unscaled."""
        t, window = 70, 16
        entries, sink = torch.randn(9, 8), torch.randn(3)
        visible = torch.randint(0, 10, (t,))
        q, near, (out, mass) = self.attend(t, window, entries, visible, sink, past=past)
        for i in range(t):
            keys = torch.cat(
                (near[max(0, past + i - window + 1) : past + i + 1], entries[: visible[i]])
            )
            e = torch.exp(q[i].double() @ keys.T.double() * 8**-0.5)
            p = e / (e.sum(-1, keepdim=True) + torch.exp(sink.double())[:, None])
            assert torch.allclose(out[i].double(), p @ keys.double(), atol=1e-6)
            on_entries = p[:, len(keys) - visible[i] :].sum(0)
            assert torch.allclose(mass[i, : visible[i]].double(), on_entries, atol=1e-6)
            assert not mass[i, visible[i] :].any()

    def test_selection_of_everything_equals_dense(self):
        entries, sink, visible = torch.randn(6, 8), torch.randn(2), torch.tensor([0, 3, 6, 6])
        index = torch.arange(6).expand(4, 6)
        selection = Selection(index, index < visible[:, None])
        torch.manual_seed(1)
        _, _, (dense, _) = self.attend(4, 4, entries, visible, sink)
        torch.manual_seed(1)
        _, _, (sparse, _) = self.attend(4, 4, entries, visible, sink, selection)
        assert torch.allclose(dense, sparse, atol=1e-6)

    def test_huge_logits_and_sinks_are_finite(self):
        sink = torch.tensor([1e4, -1e4, 0.0])
        _, _, (out, _) = self.attend(5, 4, None, torch.zeros(5, dtype=torch.int64), sink)
        assert out.isfinite().all()
        assert not out[:, 0].any()  # the sink takes everything


class TestMoE:
    def test_clamp_is_before_silu_and_asymmetric(self):
        """T12: gate from above only, linear part on both sides; the shared expert too."""
        model = random_model(schedule(0, swiglu_limit=0.5))
        expert = model.blocks[0].ffn.shared_experts
        assert isinstance(expert, Expert)
        assert expert.w1.role is Role.DENSE
        x = torch.randn(50, 64) * 4
        gate, up = expert.w1(x), expert.w3(x)
        inner = torch.nn.functional.silu(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.5)
        assert (gate < -0.5).any()
        assert torch.allclose(expert(x), expert.w2(inner), atol=1e-5)

    def test_bias_chooses_and_never_weighs(self):
        gate = random_model(schedule(0)).blocks[0].ffn.gate
        scores = torch.rand(20, 8)
        with torch.no_grad():
            gate.bias.copy_(torch.tensor([100.0, 99.0, 98.0, 0, 0, 0, 0, 0]))
        routes = gate.choose(scores, torch.zeros(20).long())
        assert routes.tolist() == [[0, 1, 2]] * 20
        weights = gate.weights(scores, routes)
        assert torch.allclose(weights, scores[:, :3] / scores[:, :3].sum(1, keepdim=True) * 1.5)

    def test_equal_scores_go_to_the_lowest_expert(self):
        gate = random_model(schedule(0)).blocks[0].ffn.gate
        with torch.no_grad():
            gate.bias.zero_()
        assert gate.choose(torch.ones(2, 8), torch.zeros(2).long()).tolist() == [[0, 1, 2]] * 2

    def test_hash_layers_route_by_token_id(self):
        """T4: the table is random and its rows are distinct experts; the gate still weighs."""
        gate = random_model(schedule(0, num_hash_layers=1)).blocks[0].ffn.gate
        ids = torch.tensor([3, 3, 7])
        routes = gate.choose(torch.rand(3, 8), ids)
        assert torch.equal(routes, gate.tid2eid[ids])
        assert (gate.tid2eid.sort(1).values.diff(dim=1) > 0).all()
        load = torch.bincount(gate.tid2eid.flatten(), minlength=8)
        assert load.min() > 0.7 * load.max()
        assert gate.bias is None

    def test_weight_is_applied_before_the_second_matrix(self):
        """It matters once that matrix's input is rounded (8.1)."""
        model = random_model(schedule(0), precision=Precision(activations_fp8=True))
        expert = model.blocks[0].ffn.experts[0]
        x, weight = torch.randn(4, 64), torch.tensor([0.3, 0.7, 1.1, 0.9])
        from hadal.model.quant import round_trip_activations

        rounded = round_trip_activations(x)
        gate = (rounded @ expert.w1.weight.T).clamp(max=1.0)
        up = (rounded @ expert.w3.weight.T).clamp(-1.0, 1.0)
        inner = weight[:, None] * torch.nn.functional.silu(gate) * up
        expected = round_trip_activations(inner) @ expert.w2.weight.T
        assert torch.allclose(expert(x, weight), expected, atol=1e-5)


class TestLosses:
    def test_indexer_target_is_the_joint_share(self):
        """T11: a head that looks at the window weighs little in the target."""
        mass = torch.tensor([[0.9 + 0.0, 0.0 + 0.01]])  # head 0 on entry 0, head 1 mostly window
        scores = torch.tensor([[1.0, 1.0]], requires_grad=True)
        loss = indexer_loss(scores, mass, torch.tensor([[True, True]]))
        target = mass / mass.sum()
        expected = (target * (target / 0.5).log()).sum()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        loss.sum().backward()
        assert torch.allclose(scores.grad, torch.tensor([[0.5, 0.5]]) - target, atol=1e-6)

    def test_indexer_loss_is_zero_when_the_scores_are_right(self):
        mass = torch.rand(6, 9)
        visible = torch.tensor([0, 1, 3, 9, 9, 2])
        seen = torch.arange(9) < visible[:, None]
        mass = mass * seen
        loss = indexer_loss(mass.clamp_min(1e-30).log(), mass, seen)
        assert loss.shape == (5,)  # the query without entries has no loss
        assert loss.abs().max() < 1e-5

    def test_balance_loss_is_one_when_balanced_and_grows(self):
        scores = torch.ones(8, 4)
        balanced = torch.tensor([[0, 1], [2, 3]] * 4)
        assert balance_loss(scores, balanced).item() == pytest.approx(1.0)
        scores[:, 0] = 9.0
        assert balance_loss(scores, torch.zeros(8, 2).long()).item() > 2


class TestArithmetic:
    def test_elementwise_equals_torch(self):
        x = torch.cat((torch.randn(1000) * 20, torch.tensor([-200.0, 200.0, 0.0])))
        x.requires_grad_()
        for ours, theirs in (
            (sigmoid, torch.sigmoid),
            (silu, torch.nn.functional.silu),
            (softplus, torch.nn.functional.softplus),
        ):
            assert torch.allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
            (gradient,) = torch.autograd.grad(ours(x).sum(), x)
            (expected,) = torch.autograd.grad(theirs(x).sum(), x)
            assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)
        y = torch.randn(5, 7)
        assert torch.allclose(softmax(y, 0), y.softmax(0))

    def test_rows_do_not_depend_on_the_batch(self):
        """The reason for product.py and elementwise.py, on awkward widths."""
        for out_width, in_width in ((8, 64), (331, 36), (24, 256), (3, 40)):
            weight, x = torch.randn(out_width, in_width), torch.randn(300, in_width)
            for function in (lambda v, w=weight: product(v, w), sigmoid, softplus, silu):
                whole = function(x)
                for rows in (slice(0, 1), slice(5, 8), slice(7, 20), slice(20, 300)):
                    assert torch.equal(function(x[rows]), whole[rows])


class TestWithoutKernels:
    """What kernels stand for in inference is said by the modules, too."""

    @pytest.mark.parametrize("role", list(Role))
    def test_only_quantised_matrices_round_their_inputs(self, role):
        formats = Formats(
            config=CONFIGS["flash_like"], storage="plain", dtype=torch.float32,
            precision=dataclasses.replace(Precision.exact(), activations_fp8=True),
        )  # fmt: skip
        matrix, x = Linear(128, 16, role, formats), torch.randn(3, 128)
        with torch.no_grad(), kernels.without_kernels():
            torch.nn.init.normal_(matrix.weight)
            exact = torch.equal(matrix(x), product(x, matrix.weight))
        assert exact == (role in (Role.PLAIN, Role.OUTPUT_A))

    @torch.no_grad()
    def test_chunks_are_the_whole(self):
        model = random_model(CONFIGS["flash_like"])
        ids = torch.randint(2, model.config.vocab_size, (300,))
        with kernels.without_kernels():
            whole, cache = model(ids, [300]), model.new_cache()
            sizes = [5, 2, 130, 1, 3, 159]
            parts = [model(part, [len(part)], [cache]) for part in ids.split(sizes)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)


def test_precision_switches_each_change_the_logits():
    """Each can be switched on alone; none is ignored; all stay near the exact result."""
    config = CONFIGS["flash_like"]
    config = dataclasses.replace(config, index_topk=16)
    ids = torch.randint(0, 512, (400,), generator=torch.manual_seed(0))
    plain = random_model(config, dtype=torch.bfloat16, precision=Precision.exact())
    exact = plain(ids, [400])
    for field in dataclasses.fields(Precision):
        value = not field.default
        model = random_model(
            config, dtype=torch.bfloat16, precision=Precision(**{field.name: value})
        )
        error = (model(ids, [400]) - exact).float().square().mean().sqrt()
        assert 0 < error < 0.3, field.name

"""The training forward: every loss, where its gradient goes, and packing (7.1)."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from hadal.model import (
    ModelConfig,
    Trace,
    Transformer,
    logits,
    mhc,
    randomize,
    training_attention,
    training_forward,
)
from hadal.model.compressor import Compressor
from hadal.model.norm import rms_norm
from hadal.model.rope import rotate, rotation
from tests.configs import CONFIGS, schedule


@pytest.fixture
def model():
    model = Transformer(CONFIGS["flash_like"])
    randomize(model, 0)
    return model


def tokens(length, seed=0):
    return torch.randint(0, 512, (length,), generator=torch.manual_seed(seed))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_language_loss_is_the_next_token_of_the_same_sample(model):
    first, second = tokens(50), tokens(70, 1)
    output = training_forward(model, torch.cat((first, second)), [50, 70])
    expected = sum(
        F.cross_entropy(rows[:-1], ids[1:], reduction="sum")
        for rows, ids in zip(logits(model, [first, second]), (first, second), strict=True)
    )
    assert output.language.item() == pytest.approx(expected.item() / (49 + 69), rel=1e-5)


def test_packed_samples_do_not_see_each_other(model):
    """Compression, window and MTP stay within a sample; a neighbour changes nothing."""
    ids = tokens(150)
    alone = training_forward(model, ids, [150])
    packed = training_forward(model, torch.cat((tokens(131, 5), ids)), [131, 150])
    assert torch.equal(packed.logits_TV[131:], alone.logits_TV)


def test_mtp_predicts_the_token_after_the_next(model):
    ids = tokens(90)
    output = training_forward(model, ids, [90])
    drafted, _ = model.draft(model.streams(ids[:-1], [89]), ids[1:], [89])
    expected = F.cross_entropy(drafted[:-1], ids[2:])
    assert output.mtp.item() == pytest.approx(expected.item(), rel=1e-5)


def test_samples_of_one_and_two_tokens(model):
    output = training_forward(model, tokens(4), [1, 2, 1])
    assert output.mtp.item() == 0.0
    assert output.language.isfinite()
    only = training_forward(model, tokens(1), [1])
    assert only.language.item() == 0.0


def test_labels_can_leave_tokens_out(model):
    ids = tokens(40)
    labels = torch.full((40,), -100)
    labels[10] = 7
    output = training_forward(model, ids, [40], labels_T=labels)
    expected = F.cross_entropy(output.logits_TV[10:11], torch.tensor([7]))
    assert output.language.item() == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_reach_everything_but_the_indexer(model):
    """Top-k passes no gradient: without its own loss the indexer stays random."""
    output = training_forward(model, tokens(300), [300])
    reached = gradients(model, output.language + output.mtp)
    idle = {n for n, _ in model.named_parameters()} - set(reached)
    assert idle == {n for n in dict(model.named_parameters()) if ".indexer." in n} | {
        n for n in dict(model.named_parameters()) if n.endswith("gate.bias")
    }
    assert all(g.isfinite().all() for g in reached.values())


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_indexer_loss_moves_only_the_indexer(model, stage):
    output = training_forward(model, tokens(300), [300], indexer_stage=stage)
    assert output.indexer.item() > 0
    reached = gradients(model, output.indexer)
    assert reached
    assert {n for n, g in reached.items() if g.abs().max() > 0} == {
        n for n, _ in model.named_parameters() if ".indexer." in n
    }


def test_dense_stage_attends_to_everything(model):
    """Warm-up: attention must not depend on the untrained indexer's choice."""
    ids = tokens(300)  # 75 entries, index_topk 16
    dense = training_forward(model, ids, [300], indexer_stage="dense").logits_TV
    sparse = training_forward(model, ids, [300], indexer_stage="sparse").logits_TV
    assert (dense[:60] - sparse[:60]).abs().max() < 1e-4
    assert (dense - sparse).abs().max() > 1e-3
    assert torch.equal(sparse, training_forward(model, ids, [300]).logits_TV)


def test_indexer_learns_what_attention_looks_at(model):
    """A few steps on its own loss must lower it."""
    ids = tokens(256)
    indexer = [p for n, p in model.named_parameters() if ".indexer." in n]
    optimizer = torch.optim.Adam(indexer, lr=3e-3)
    losses = []
    for _ in range(12):
        loss = training_forward(model, ids, [256], indexer_stage="dense").indexer
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_balance_and_loads(model):
    output = training_forward(model, tokens(200), [200])
    learned = {"layers.3", "layers.4", "mtp.0"}  # the first three route by hash
    assert set(output.expert_loads) == learned
    assert all(
        load.sum() == 3 * n
        for load, n in zip(output.expert_loads.values(), (200, 200, 199), strict=True)
    )
    assert output.balance.item() >= 0.9 * len(learned)
    reached = gradients(model, output.balance)
    assert any("ffn.gate.weight" in n for n in reached)


def test_replay_repeats_the_choices_of_another_model(model):
    """What replay is for: with choices forced, only arithmetic differs."""
    other = Transformer(CONFIGS["flash_like"], dtype=torch.bfloat16)
    randomize(other, 0)
    ids = tokens(400)
    trace, free = Trace(), Trace()
    with torch.no_grad():
        exact = model(ids, [400], trace=trace)
        alone = other(ids, [400], trace=free)
        forced = other(ids, [400], trace=trace.replay())
    assert any(not torch.equal(free.routes[n], trace.routes[n]) for n in trace.routes)
    assert (forced - exact).square().mean() < (alone - exact).square().mean()


@pytest.mark.parametrize("lengths", [[1], [3], [3, 3]])
@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_samples_without_any_entry_have_no_indexer_loss(model, stage, lengths):
    """A mean over nothing is NaN, and one such batch would destroy the indexer."""
    output = training_forward(model, tokens(sum(lengths)), lengths, indexer_stage=stage)
    assert output.indexer.item() == 0.0


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_indexer_loss_is_the_formula(stage):
    """One CSA layer, written out over all entries: scale, set and target."""
    model = Transformer(schedule(4, index_topk=6))
    randomize(model, 3)
    ids = tokens(80)
    loss = training_forward(model, ids, [80], indexer_stage=stage).indexer
    attention = model.blocks[0].attn
    inputs = {}
    handle = attention.register_forward_pre_hook(lambda _, args: inputs.update(x=args[0]))
    trace = Trace(indexer_stage=stage)
    model(ids, [80], trace=trace)
    handle.remove()
    config, x = model.config, inputs["x"]
    positions = torch.arange(80)
    angles = rotation(config, attention.kind, positions)
    latent = attention.q_norm(attention.wq_a(x))

    def entries(compressor):
        kv, gate = compressor.project(x, positions)
        return compressor(kv, gate, compressor.fresh_tail(x.device), 0)[0]

    keys = torch.cat(
        (rotate(attention.kv_norm(attention.wkv(x)), angles), entries(attention.compressor))
    )
    q = attention.wq_b(latent).unflatten(-1, (config.num_attention_heads, -1))
    q = rotate(rms_norm(q, config.rms_norm_eps), angles)
    indexer = attention.indexer
    qi = rotate(indexer.wq_b(latent).unflatten(-1, (config.index_n_heads, -1)), angles)
    w = indexer.weights_proj(x) * config.index_head_dim**-0.5 * config.index_n_heads**-0.5
    scores = torch.einsum(
        "ti,tic->tc", w, torch.einsum("tik,ck->tic", qi, entries(indexer.compressor)).relu()
    )
    total, count = 0.0, 0
    for t in range(80):
        near = [p for p in range(80) if t - config.sliding_window < p <= t]
        far = list(range((t + 1) // 4))
        if stage == "sparse":
            far = sorted(sorted(far, key=lambda c, t=t: (-scores[t, c].item(), c))[:6])
        if not far:
            continue
        logits_HS = q[t] @ keys[near + [80 + c for c in far]].T * config.head_dim**-0.5
        joint = torch.cat((logits_HS, attention.attn_sink[:, None]), 1).softmax(1)
        target = joint[:, len(near) : -1].sum(0)
        target = target / target.sum()
        total += (target * (target.log() - scores[t, far].log_softmax(0))).sum().item()
        count += 1
    assert loss.item() == pytest.approx(total / count, rel=1e-4)


def test_two_mtp_blocks_chain(model):
    """The second block reads the first one's streams and one token more; losses are averaged."""
    config = dataclasses.replace(
        CONFIGS["window_only"], num_nextn_predict_layers=2, compress_ratios=(0, 0, 0, 0)
    )
    two = Transformer(config)
    randomize(two, 0)
    ids = tokens(60)
    first, streams = two.draft(two.streams(ids, [60])[:59], ids[1:], [59])
    second, _ = two.draft(streams[:58], ids[2:], [58], mtp_idx=1)
    expected = (F.cross_entropy(first[:-1], ids[2:]) + F.cross_entropy(second[:-1], ids[3:])) / 2
    output = training_forward(two, ids, [60])
    assert output.mtp.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("stage", [None, "dense", "sparse"])
@pytest.mark.parametrize(("name", "window"), [("flash_like", None), ("nano", None), ("nano", 9)])
def test_fast_is_the_reference(stage, name, window):
    """Losses and gradients of the fast twins of attention, indexer and mHC are the reference's.

    With one of three sets of weights: where two experts or entries are as good as each other to the last bit,
    which depends on the processor, another one is chosen and gradients differ by a percent.
    """
    differences = []
    for seed in range(3):
        differences.append(difference_of_fast(stage, name, window, seed))
        if max(differences[-1].values()) < 1e-3:
            return
    raise AssertionError(differences)


def difference_of_fast(stage, name, window, seed):
    """Return the losses' absolute and the gradients' relative differences."""
    model = Transformer(CONFIGS[name] if name in CONFIGS else ModelConfig.nano())
    randomize(model, seed)
    ids = tokens(700)
    labels = torch.where(torch.arange(700) % 3 == 0, tokens(700, 2), -100)
    found = {}
    for fast in (False, True):
        output = training_forward(
            model, ids, [400, 300], labels_T=labels, indexer_stage=stage, window=window, fast=fast,
        )  # fmt: skip
        total = output.language + output.mtp + output.indexer + output.balance
        found[fast] = output, gradients(model, total)
    (slow, slow_grads), (fast, fast_grads) = found[False], found[True]
    assert fast.logits_TV.shape[0] == (labels >= 0).sum()
    assert slow_grads.keys() == fast_grads.keys()
    losses = {
        loss: abs(getattr(fast, loss).item() - getattr(slow, loss).item())
        for loss in ("language", "mtp", "indexer", "balance")
    }
    return losses | {
        key: ((fast_grads[key] - grad).abs().max() / grad.abs().max().clamp_min(1e-9)).item()
        for key, grad in slow_grads.items()
    }


def test_what_is_float32_stays_so_where_other_products_are_halved(model):
    """Gate, compressors, the mixing of streams and the head (spec 2.7, 3.2)."""
    size = model.config.hidden_size
    x, streams = torch.randn(20, size), torch.randn(20, model.config.hc_mult, size)
    positions = torch.arange(20)
    gate = model.layers[-1].ffn.gate
    compressor = next(m for m in model.modules() if isinstance(m, Compressor))

    def computed():
        head = (getattr(model, f"hc_head_{name}") for name in ("fn", "base", "scale"))
        stream = mhc.collapse(streams, *head, model.config)
        return [gate.scores(x), *compressor.project(x, positions), stream]

    exact = computed()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for halved, whole in zip(computed(), exact, strict=True):
            assert halved.dtype == torch.float32
            assert torch.equal(halved, whole)
        said = training_forward(model, tokens(50), [50], fast=True).logits_TV
    assert (said != said.bfloat16().float()).any()


def test_chosen_entries_are_gathered_or_masked(monkeypatch):
    """To the same losses and gradients."""
    model = Transformer(ModelConfig.nano())
    randomize(model, 0)
    found = []
    for times in (1, 100):
        monkeypatch.setattr(training_attention, "_GATHERED_FROM", times)
        output = training_forward(model, tokens(900), [500, 400], indexer_stage="sparse", fast=True)
        found.append((output, gradients(model, output.language + output.mtp + output.indexer)))
    (gathered, gathered_grads), (masked, masked_grads) = found
    assert gathered.indexer.item() == pytest.approx(masked.indexer.item(), rel=1e-5)
    assert gathered.language.item() == pytest.approx(masked.language.item(), rel=1e-6)
    for name, grad in masked_grads.items():
        assert (grad - gathered_grads[name]).abs().max() <= 1e-4 * grad.abs().max(), name


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_long_samples_are_computed_twice(stage, monkeypatch):
    """What is computed again for the gradient, to save memory, gives the same losses and gradients."""
    model = Transformer(ModelConfig.nano())
    randomize(model, 0)
    found = []
    for longest in (10_000, 300):
        monkeypatch.setattr(training_attention, "_RECOMPUTED_FROM", longest)
        output = training_forward(model, tokens(700), [400, 300], indexer_stage=stage, fast=True)
        total = output.language + output.mtp + output.indexer
        found.append((total.item(), gradients(model, total)))
    (kept, kept_grads), (again, again_grads) = found
    assert kept == again
    for name, grad in kept_grads.items():
        assert (grad - again_grads[name]).abs().max() <= 1e-5 * grad.abs().max(), name


def test_a_narrow_window_hides_what_is_near():
    """With a window of one token and no entry yet, a token is told by itself alone."""
    model = Transformer(ModelConfig.nano())
    randomize(model, 0)
    ids, others = tokens(3), tokens(3, 2)
    others[-1] = ids[-1]
    labels = torch.tensor([-100, -100, 1])
    losses = [
        [training_forward(model, i, [3], labels_T=labels, window=window).language for i in (ids, others)]
        for window in (1, None)
    ]  # fmt: skip
    assert losses[0][0] == losses[0][1]
    assert losses[1][0] != losses[1][1]

"""Logits against transformers on random checkpoints, weights through files (issue: line 1, 5).

Every parameter is random (hadal.model.randomize). Seeds are fixed; both sides run free, so a
near-tie in the indexer or router may not lie within rounding: each config's seed was the first
without one among the logits' argmax, too.
"""

import pytest
import torch

from hadal.checkpoint import load, save
from hadal.checkpoint.names import expert_stack, to_transformers
from hadal.config import YarnScaling
from hadal.model import ModelConfig, Precision, Transformer, logits, randomize
from hadal.model.mhc import write
from tests.configs import CONFIGS, schedule

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

LENGTHS = [1, 3, 4, 5, 127, 128, 129, 511, 512, 513, 700, 2049]
TOLERANCE = 1e-4
"""Both sides are float32 with logits of order 0.5; transformers' own cached decode is off 7e-6."""


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def random_model(config: ModelConfig, seed: int = 1) -> Transformer:
    model = Transformer(config)
    randomize(model, seed)
    return model


def peer(path, dtype=torch.float32):
    # "eager" experts: the grouped kernel refuses widths that are no multiple of 16 bytes
    model, report = transformers.DeepseekV4ForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def peer_logits(model, ids):
    with torch.no_grad():
        return model(ids[None], use_cache=False).logits[0].float()


def tokens(config: ModelConfig, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, config.vocab_size, (length,), generator=generator)


def assert_same_choices(ours, theirs, what):
    """The best token is the same, unless the best two are closer than the sides are to each other."""
    best = theirs.topk(2).values
    tie = best[:, 0] - best[:, 1] <= 2 * (ours - theirs).abs().max()
    same = ours.argmax(-1) == theirs.argmax(-1)
    assert bool((same | tie).all()), what
    assert same.float().mean() > 0.99, what


@pytest.mark.parametrize("layout", ["official", "huggingface"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, layout, tmp_path):
    """Argmax equal at every position and logits within 1e-4, at every length.

    `csa_only` and others have index_topk 16, so all lengths above 64 make the indexer choose.
    """
    config = CONFIGS[name]
    save(random_model(config), tmp_path / "model", layout=layout, max_shard_bytes=200_000)
    model, other = load(tmp_path / "model"), peer(tmp_path / "model")
    for length in LENGTHS:
        ids = tokens(config, length)
        ours, theirs = logits(model, [ids])[0], peer_logits(other, ids)
        worst = (ours - theirs).abs().max().item()
        assert worst <= TOLERANCE, f"{name}, length {length}: logits differ by {worst:.2e}"
        assert_same_choices(ours, theirs, f"{name}, length {length}")


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_transformers(name, tmp_path):
    """Differentiable end to end: every parameter's gradient of a random function of the logits."""
    config = CONFIGS[name]
    save(random_model(config), tmp_path / "model", layout="huggingface")
    model, other = load(tmp_path / "model"), peer(tmp_path / "model")
    ids = tokens(config, 300)
    probe = torch.randn(300, config.vocab_size) / 300
    (model(ids, [300]) * probe).sum().backward()
    (other(ids[None], use_cache=False).logits[0] * probe).sum().backward()
    theirs = {n: p.grad for n, p in other.named_parameters() if p.grad is not None}
    compared = 0
    for name_ours, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        stack = expert_stack(name_ours)
        expected = theirs[stack or to_transformers(name_ours)]
        if stack is not None:
            expert, matrix = int(name_ours.split(".")[-3]), name_ours.split(".")[-2]
            half = config.moe_intermediate_size
            rows = {"w1": slice(0, half), "w3": slice(half, None), "w2": slice(None)}[matrix]
            expected = expected[expert, rows]
        error = (parameter.grad - expected).norm() / expected.norm().clamp_min(1e-6)
        assert error < 1e-3, f"{name_ours}: gradients differ by {error:.1e} of their norm"
        compared += 1
    assert compared > 30


@pytest.mark.parametrize("phase", range(4))
def test_every_phase_of_the_compression_window(phase, tmp_path):
    """T16: an answer was wrong exactly when the prompt's length was 3 mod 4."""
    config = CONFIGS["flash_like"]
    save(random_model(config), tmp_path / "model")
    model, other = load(tmp_path / "model"), peer(tmp_path / "model")
    for length in (252 + phase, 380 + phase, 640 + phase):
        ids = tokens(config, length)
        assert (logits(model, [ids])[0] - peer_logits(other, ids)).abs().max() <= TOLERANCE


def test_position_of_yarn_at_long_range(tmp_path):
    """T6a: a wrong theta or a missing YaRN is fine within the window and breaks far beyond."""
    yarn = YarnScaling(factor=16.0, original_max_position_embeddings=128)
    config = schedule(0, 4, 128, rope_scaling=yarn, index_topk=8)
    save(random_model(config), tmp_path / "model")
    model, other = load(tmp_path / "model"), peer(tmp_path / "model")
    ids = tokens(config, 3000)
    assert (logits(model, [ids])[0] - peer_logits(other, ids)).abs().max() <= TOLERANCE


def test_checkpoint_that_transformers_saved(tmp_path):
    """`save_pretrained` writes a third dialect of names, and no MTP block."""
    config = CONFIGS["flash_like"]
    model = random_model(config)
    save(model, tmp_path / "ours", layout="huggingface")
    peer(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = load(tmp_path / "theirs", mtp=False)
    ids = tokens(config, 300)
    assert torch.equal(logits(back, [ids])[0], logits(model, [ids])[0])


@pytest.fixture(scope="module")
def bfloat16_peer(tmp_path_factory):
    path = tmp_path_factory.mktemp("bfloat16") / "model"
    save(random_model(schedule(0, 128, num_hash_layers=1)), path, dtype=torch.bfloat16)
    return path, peer(path, torch.bfloat16)


def test_bfloat16_whole_model(bfloat16_peer):
    """Rounding to BF16 everywhere leaves the two 0.01 apart, on logits of 0.5."""
    path, other = bfloat16_peer
    model = load(path, precision=Precision.transformers())
    ids = tokens(model.config, 400)
    error = logits(model, [ids])[0] - peer_logits(other, ids)
    assert error.square().mean().sqrt() < 0.02


def test_parity_switch_rounds_where_the_peer_rounds(bfloat16_peer):
    """With `Precision.transformers()` gate choices and stream mixing come closer to the peer's."""
    path, other = bfloat16_peer
    x_TD = torch.randn(4000, 64).bfloat16()
    streams_TMD = torch.randn(4000, 4, 64).bfloat16()
    theirs = other.model.layers[1]
    post, comb, _ = theirs.attn_hc(streams_TMD[None])
    mixed = post.bfloat16()[..., None] * x_TD[None, :, None] + torch.matmul(
        comb.bfloat16().transpose(-1, -2), streams_TMD[None]
    )
    chosen = theirs.mlp.gate(x_TD)[2].sort(-1).values
    same_routes, same_streams = {}, {}
    for precision in (Precision.transformers(), Precision.exact()):
        block = load(path, precision=precision).layers[1]
        routes = block.ffn.gate.choose(block.ffn.gate.scores(x_TD), torch.zeros(4000).long())
        same_routes[precision] = (routes.sort(-1).values == chosen).all(-1).float().mean().item()
        _, mix = block._read("attn", streams_TMD, block.attn_norm, fast=False)
        ours = write(streams_TMD, x_TD, mix, in_float32=precision.mhc_float32)
        same_streams[precision] = (ours == mixed[0]).float().mean().item()
    assert same_routes[Precision.transformers()] > same_routes[Precision.exact()]
    assert same_streams[Precision.transformers()] > same_streams[Precision.exact()]

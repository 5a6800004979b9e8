"""Muon: orthogonal updates of the right size, and which parameters it has."""

import pytest
import torch
from torch import nn

from hadal.model import ModelConfig, Transformer
from hadal.train.muon import Muon, newton_schulz, split_parameters


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 48, 128), (2, 128, 32)])
def test_newton_schulz_keeps_vectors_and_levels_values(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    values = torch.linalg.svdvals(newton_schulz(matrices).float())
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert (newton_schulz(matrices).float() - u @ v).abs().max() < 0.12


def test_an_update_has_the_wanted_size():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(64, 256))
    weight.grad = torch.randn(64, 256)
    Muon([weight], lr=0.01).step()
    assert weight.square().mean().sqrt().item() == pytest.approx(0.18 * 0.01, rel=0.1)


def test_matrices_are_stepped_as_if_alone():
    torch.manual_seed(0)
    grads = [torch.randn(32, 32) for _ in range(3)]
    together = [nn.Parameter(torch.ones(32, 32)) for _ in grads]
    alone = [nn.Parameter(torch.ones(32, 32)) for _ in grads]
    optimizers = [Muon(together, lr=0.1), *(Muon([twin], lr=0.1) for twin in alone)]
    for _ in range(2):
        for parameter, twin, grad in zip(together, alone, grads, strict=True):
            parameter.grad, twin.grad = grad.clone(), grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for parameter, twin in zip(together, alone, strict=True):
        torch.testing.assert_close(parameter, twin, rtol=1e-2, atol=1e-3)


def test_who_trains_what():
    model = Transformer(ModelConfig.nano())
    muon, adamw = split_parameters(model)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in adamw if p.ndim == 2} == {
        name
        for name in names.values()
        if name.endswith(".ape") or name in ("embed.weight", "head.weight")
    }
    biases = [n for n in names.values() if n.endswith("gate.bias")]
    assert biases
    assert not {names[id(p)] for p in [*muon, *adamw]} & set(biases)
    assert len(muon) + len(adamw) + len(biases) == len(names)

"""The user's model comes back exactly as it was."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

import emscan


class Busy(nn.Module):
    """Dropout, running statistics, a cache, randomness of its own, modes set one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)
        self.register_buffer("steps", torch.zeros(()))
        self.cache = None

    def forward(self, x):
        self.steps += 1
        self.cache = self.a(x)
        noise = torch.randn(()) + random.random() + np.random.rand()
        return self.b(torch.relu(self.drop(self.norm(self.cache)))) + 0 * noise


def test_modes_buffers_generators_attributes_hooks_and_gradients() -> None:
    model = Busy().train()
    model.norm.eval()
    calls = []
    handle = model.a.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(5, 6)).sum().backward()
    model.cache = None
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    emscan.audit(model, torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), batch_size=8)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert model.cache is None
    assert list(model.a._forward_hooks) == [handle.id]
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks
    model.train()(torch.randn(5, 6)).sum().backward()


def test_restored_after_a_failure_too() -> None:
    model = Busy().train()
    with pytest.raises(emscan.errors.ProbeError, match="takes 6 features, the probe's x has 7"):
        emscan.audit(model, torch.randn(4, 7))
    assert all(module.training for module in model.modules())
    assert not torch.nn.modules.module._global_forward_hooks


def test_inputs_are_not_written_on() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3))
    x = torch.randn(10, 6)
    kept = x.clone()
    emscan.audit(model, x)
    assert torch.equal(x, kept)


def test_the_same_seed_gives_the_same_report() -> None:
    model = Busy()
    x = torch.randn(30, 6)
    assert emscan.audit(model, x, seed=3).to_dict() == emscan.audit(model, x, seed=3).to_dict()

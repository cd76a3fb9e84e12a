"""Planted components are found by exact index, in every form of one network; nothing else is called dead."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import emscan

DEAD = [2, 7, 19]


def kill(layer: nn.Module, rows: list[int]) -> None:
    with torch.no_grad():
        layer.weight[rows] = 0
        layer.bias[rows] = -1


class Functional(nn.Module):
    def __init__(self, gate) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 24), nn.Linear(24, 5)
        self.gate = gate

    def forward(self, x):
        return self.b(self.gate(self.a(x)))


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.Linear(24, 5)

    def forward(self, x):
        return self.b(F.relu(self.norm(self.a(x))).mean((2, 3)))


class Heads(nn.Module):
    """The gate sees rows of the weight split over two axes, permuted, after a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 36), nn.Linear(24, 5)

    def forward(self, x):
        z = self.a(x)[..., 12:].view(*x.shape[:-1], 4, 6).transpose(-1, -2)
        return self.b(F.relu(z).transpose(-1, -2).flatten(-2))


def gates():
    return {
        "functional": F.relu,
        "clamp": lambda z: z.clamp(min=0),
        "where": lambda z: torch.where(z > 0, z, torch.zeros_like(z)),
        "mask": lambda z: z * (z > 0),
        "maximum": lambda z: torch.maximum(z, torch.zeros(())),
        "squared": lambda z: F.relu(z).square(),
        "in place": lambda z: F.relu(z, inplace=True),
        "threshold": lambda z: F.threshold(z, 0.0, 0.0),
    }


def gated(report):
    return next(layer for layer in report.layers if layer.mechanism == "threshold")


@pytest.mark.parametrize("form", gates())
@pytest.mark.parametrize("shape", [(300, 12), (60, 5, 12)])
def test_functional_forms(form: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Functional(gates()[form])
    kill(model.a, DEAD)
    report = emscan.audit(model, torch.randn(shape))
    row = gated(report)
    assert row.name == "a"
    assert row.components.dead == DEAD
    assert row.components.count == 24
    assert report.summary.dead == 3


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_all_forms_of_one_network_give_one_report() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 5), nn.Softmax(-1))
    kill(model[0], DEAD)
    x = torch.randn(64, 12)
    batch = torch.export.Dim("batch", min=2)
    forms = {
        "module": model,
        "script": torch.jit.script(model),
        "trace": torch.jit.trace(model, x),
        "export": torch.export.export(model, (x,), dynamic_shapes=({0: batch},)),
    }
    reports = {name: emscan.audit(form, x).to_dict() for name, form in forms.items()}
    for document in reports.values():
        for layer in document["layers"]:
            layer["module"] = None  # only eager modules say which module called the gate
            layer["evidence"] = {**(layer["evidence"] or {}), "source": None}
        for key in ("model", "environment"):
            document.pop(key)
    assert reports["module"]["layers"][0]["components"]["dead"] == DEAD
    for name, document in reports.items():
        assert document == reports["module"], name


def test_convolution_behind_batch_norm_in_both_memory_layouts() -> None:
    torch.manual_seed(0)
    model = Conv().eval()
    with torch.no_grad():
        model.norm.weight[DEAD] = 0
        model.norm.bias[DEAD] = -1
    x = torch.randn(16, 3, 9, 9)
    for layout in (torch.contiguous_format, torch.channels_last):
        row = gated(emscan.audit(copy.deepcopy(model).to(memory_format=layout), x.to(memory_format=layout)))
        assert row.components.dead == DEAD
        assert row.composition == "Conv2d + BatchNorm + ReLU"
        z = model.norm(model.a(x)).double()
        rates = (z > 0).double().mean((0, 2, 3))
        assert row.components.on_rate == pytest.approx(rates.tolist(), abs=1e-12)


def test_rows_of_a_sliced_split_and_transposed_weight() -> None:
    torch.manual_seed(0)
    model = Heads()
    kill(model.a, [3, 14, 25, 35])
    row = gated(emscan.audit(model, torch.randn(50, 4, 12)))
    assert row.components.count == 24
    assert row.components.dead == [14, 25, 35]  # row 3 does not pass this gate


def test_a_unit_that_fires_once_in_4096_is_not_dead_whatever_the_batch_size() -> None:
    model = Functional(F.relu)
    kill(model.a, DEAD)
    x = torch.rand(4096, 12)
    x[:, 0] = 0
    x[1234, 0] = 1
    with torch.no_grad():
        model.a.weight[5], model.a.bias[5] = 0, 0
        model.a.weight[5, 0] = 1
    for size in (1, 32, 1000, 4096):
        rows = x[1200:1300] if size == 1 else x
        found = gated(emscan.audit(model, rows, batch_size=size)).components
        z = model.a(rows)
        assert found.on_rate == pytest.approx((z > 0).double().mean(0).tolist(), abs=1e-12)
        assert found.on_rate[5] == 1 / len(rows)
        assert found.dead == (z.amax(0) <= 0).nonzero().flatten().tolist()
        assert set(DEAD) <= set(found.dead)
        assert 5 not in found.dead


def test_clipped_units_say_where_they_are_stuck() -> None:
    model = Functional(F.relu6)
    kill(model.a, [1])
    with torch.no_grad():
        model.a.weight[4], model.a.bias[4] = 0, 9
    row = gated(emscan.audit(model, torch.randn(100, 12)))
    assert row.components.dead == [1, 4]
    assert row.components.stuck_at == [0.0, 6.0]


def test_thresholds_that_differ_from_unit_to_unit() -> None:
    class Jump(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.t = nn.Linear(12, 24), nn.Parameter(torch.full((24,), 0.1))

        def forward(self, x):
            z = self.a(x)
            return z * (z > self.t)

    torch.manual_seed(0)
    model = Jump()
    with torch.no_grad():
        model.t[DEAD] = 1e6
    x = torch.randn(200, 12)
    row = gated(emscan.audit(model, x, batch_size=64))
    assert row.components.dead == DEAD
    rates = (model.a(x) > model.t).double().mean(0)
    assert row.components.on_rate == pytest.approx(rates.tolist(), abs=1e-12)


@pytest.mark.parametrize("gate", [F.gelu, F.silu, torch.tanh, F.softplus, torch.sigmoid, F.leaky_relu, F.elu])
def test_gates_that_keep_both_sides_alive_have_no_dead_unit(gate) -> None:
    torch.manual_seed(0)
    model = Functional(gate)
    kill(model.a, DEAD)  # an energy of -1 is not dead here
    assert emscan.audit(model, torch.randn(500, 12)).summary.dead == 0


@pytest.mark.parametrize(
    ("gate", "far"), [(torch.tanh, 40.0), (torch.sigmoid, 200.0), (F.gelu, -60.0), (F.silu, -200.0)]
)
def test_underflow_is_listed_as_numeric(gate, far: float) -> None:
    torch.manual_seed(0)
    model = Functional(gate)
    with torch.no_grad():
        model.a.weight[DEAD], model.a.bias[DEAD] = 0, far
    row = emscan.audit(model, torch.randn(500, 12)).layers[0]
    assert row.components.dead == DEAD
    assert row.components.numeric


def test_units_dead_by_their_weights_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[2].weight[3], model[2].bias[3] = -model[2].weight[3].abs(), -0.5
    second = next(layer for layer in emscan.audit(model, torch.randn(40, 6)).layers if layer.name == "2")
    assert second.components.provably_dead == [3]
    assert 3 in second.components.dead


def test_experts_that_are_only_second_choice_are_alive() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 6)
            self.experts = nn.ModuleList(nn.Linear(8, 3) for _ in range(6))

        def forward(self, x):
            w, i = self.gate(x).softmax(-1).topk(2, -1)
            out = x.new_zeros(len(x), 3)
            for e, expert in enumerate(self.experts):
                rows, slot = torch.where(i == e)
                if len(rows):
                    out.index_add_(0, rows, expert(x[rows]) * w[rows, slot, None])
            return out

    torch.manual_seed(0)
    model = Router()
    with torch.no_grad():
        model.gate.weight.mul_(0.1)
        model.gate.bias.copy_(torch.tensor([9.0, 8.0, -9.0, -9.0, -9.0, -9.0]))
    x = torch.randn(100, 8)
    row = next(layer for layer in emscan.audit(model, x, batch_size=16).layers if layer.mechanism == "truncation")
    assert row.components.dead == [2, 3, 4, 5]
    assert row.components.load == pytest.approx([0.5, 0.5, 0, 0, 0, 0])
    assert row.alternatives.kind == "experts"

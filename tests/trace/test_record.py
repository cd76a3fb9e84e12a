"""What a recorded run knows: dataflow through in-place writes, fused operators, names that survive another batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from emscan.state import undisturbed
from emscan.trace.follow import Taps, follow
from emscan.trace.record import record

BUDGET = 1 << 26


def test_the_input_of_an_in_place_operator_keeps_its_numbers() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True))
    x = torch.randn(3, 4)
    trace = record(model, (x,), {}, budget=BUDGET)
    linear, relu = trace.calls
    assert relu.op == "aten.relu"
    assert relu.in_place
    assert torch.equal(linear.out.tensor, model[0](x))
    assert torch.equal(relu.out.tensor, model(x))


def test_writes_through_a_view_reach_later_reads_of_the_base() -> None:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 6)

        def forward(self, x):
            z = self.fc(x)
            F.relu(z.view(-1), inplace=True)
            return z * 2

    trace = record(M(), (torch.randn(3, 4),), {}, budget=BUDGET)
    product = trace.calls[-1]
    assert product.inputs[0].call.op == "emscan.mutated"
    assert any(value.call and value.call.op == "aten.relu" for value in product.inputs[0].call.inputs)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_fused_encoder_layer_stands_for_its_parts(norm_first: bool, activation: str) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=norm_first, activation=activation).eval()
    x = torch.randn(3, 5, 16)
    scripted = torch.jit.script(layer)
    with torch.inference_mode():
        expected = layer(x)
    with undisturbed(scripted, 0):
        torch.backends.mha.set_fastpath_enabled(True)  # TorchScript asks for itself
        trace = record(scripted, (x,), {}, budget=BUDGET)
    ops = [call.op for call in trace.calls]
    assert "aten.scaled_dot_product_attention" in ops
    assert f"aten.{activation}" in ops
    assert torch.allclose(trace.outputs[0].tensor, expected, atol=1e-5)


def test_names_do_not_depend_on_the_batch() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2, enable_nested_tensor=False
    )
    with undisturbed(model, 0):
        small = record(model, (torch.randn(2, 5, 16),), {}, budget=BUDGET)
        large = record(model, (torch.randn(7, 9, 16),), {}, budget=BUDGET)
    assert [call.key for call in small.calls] == [call.key for call in large.calls]
    assert len({call.key for call in small.calls}) > len(small.calls) // 2


def test_follow_hands_out_what_was_asked_for_once_per_computation() -> None:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            for _ in range(3):
                x = F.relu(self.fc(x))
            return x

    model, x = M(), torch.randn(5, 4)
    trace = record(model, (x,), {}, budget=BUDGET)
    gates = [call.out for call in trace.calls if call.op == "aten.relu"]
    assert len({value.key for value in gates}) == 1
    assert len({value.flow for value in gates}) == 3
    taps, heard = Taps(known={call.key for call in trace.calls}), []
    for value in gates:
        taps.on_value(value.key, "gate", lambda tensor: heard.append(tensor.clone()))
    taps.settle(trace)
    outputs, unseen = follow(model, (x,), {}, taps, frozenset({"aten.relu"}))
    assert not unseen
    assert len(heard) == 3
    assert torch.equal(heard[-1], outputs[0])
    assert torch.equal(heard[0], F.relu(model.fc(x)))


def test_a_branch_that_was_not_seen_is_noticed() -> None:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return F.relu(self.a(x)) if x.mean() > 0 else torch.tanh(self.b(x))

    model = M()
    trace = record(model, (torch.ones(2, 4),), {}, budget=BUDGET)
    taps = Taps(known={call.key for call in trace.calls})
    watched = frozenset({"aten.relu", "aten.tanh"})
    assert follow(model, (torch.ones(3, 4),), {}, taps, watched)[1] == set()
    assert follow(model, (-torch.ones(3, 4),), {}, taps, watched)[1] == {"aten.tanh"}


def test_a_no_grad_block_is_noticed() -> None:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                y = self.fc(x)
            return y + self.fc(x)

    trace = record(M(), (torch.randn(2, 4),), {}, budget=BUDGET)
    assert [call.no_grad for call in trace.calls if call.op == "aten.linear"] == [True, False]
    assert torch.no_grad.__enter__.__module__.startswith("torch")

"""Gates inside recurrent operators: from the odds handed out, the operators' own outputs must follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emscan.measure.recurrent import cell_odds, sequence_odds, weights_of


def arguments(rnn: nn.RNNBase, x: Tensor, state: list[Tensor]) -> dict[str, Any]:
    return {
        "input": x,
        "hx": state if len(state) > 1 else state[0],
        "params": list(rnn._flat_weights),
        "has_biases": rnn.bias,
        "num_layers": rnn.num_layers,
        "bidirectional": rnn.bidirectional,
        "batch_first": rnn.batch_first,
    }


def unrolled(kind: str, odds: Tensor, state: list[Tensor], before: Tensor) -> Tensor:
    """Return the outputs (T, N, hidden) that gates with these odds give; ``before``: states that entered each step."""
    if kind == "lstm":
        i, f, g, o = odds.chunk(4, -1)
        cell, steps = state[1], []
        for t in range(len(odds)):
            cell = torch.sigmoid(f[t]) * cell + torch.sigmoid(i[t]) * torch.tanh(g[t] / 2)
            steps.append(torch.sigmoid(o[t]) * torch.tanh(cell))
        return torch.stack(steps)
    if kind == "gru":
        _, z, n = odds.chunk(3, -1)
        update = torch.sigmoid(z)
        return (1 - update) * torch.tanh(n / 2) + update * before
    return torch.tanh(odds / 2) if kind == "tanh" else torch.relu(odds)


CLASSES = {"lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN, "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k)}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_gates_of_a_sequence_give_the_operators_outputs(
    kind: str, bias: bool, bidirectional: bool, batch_first: bool
) -> None:
    rnn = CLASSES[kind](5, 4, num_layers=2, bias=bias, bidirectional=bidirectional, batch_first=batch_first).double()
    x = torch.randn(6, 3, 5).double()
    directions = 2 if bidirectional else 1
    state = [torch.randn(2 * directions, 3, 4).double() for _ in range(2 if kind == "lstm" else 1)]
    given = x.transpose(0, 1) if batch_first else x
    with torch.inference_mode():
        out = rnn(given, tuple(state) if kind == "lstm" else state[0])[0]
        out = out.transpose(0, 1) if batch_first else out
        found = list(sequence_odds(kind, arguments(rnn, given, state)))
    assert len(found) == 2 * directions
    weights = weights_of(arguments(rnn, given, state))
    assert [w.shape[0] for w in weights] == [odds.shape[-1] for odds in found]
    for direction in range(directions):  # the last layer, whose outputs the operator hands out
        index = directions + direction
        expected = out[..., direction * 4 : direction * 4 + 4]
        expected = expected.flip(0) if direction else expected
        start = [s[index] for s in state]
        before = torch.cat([start[0][None], expected[:-1]])
        odds = found[index].unflatten(0, (6, 3))
        torch.testing.assert_close(unrolled(kind, odds, start, before), expected)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_unbatched_sequences(kind: str) -> None:
    rnn = CLASSES[kind](5, 4)
    x = torch.randn(6, 5)
    state = [torch.zeros(1, 4) for _ in range(2 if kind == "lstm" else 1)]
    with torch.inference_mode():
        expected = rnn(x)[0]
        (odds,) = sequence_odds(kind, arguments(rnn, x, state))
        before = torch.cat([state[0], expected[:-1]])
    torch.testing.assert_close(unrolled(kind, odds, [s[0] for s in state], before), expected)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_projected_lstm_feeds_back_its_projection() -> None:
    rnn = nn.LSTM(5, 6, proj_size=3)
    x = torch.randn(4, 2, 5)
    state = [torch.randn(1, 2, 3), torch.randn(1, 2, 6)]
    with torch.inference_mode():
        expected = rnn(x, tuple(state))[0]
        (odds,) = sequence_odds("lstm", arguments(rnn, x, state))
        hidden = unrolled("lstm", odds.unflatten(0, (4, 2)), [s[0] for s in state], expected)
        torch.testing.assert_close(hidden @ rnn.weight_hr_l0.T, expected)


@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh"])
def test_gates_of_a_cell(kind: str) -> None:
    cell = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "tanh": nn.RNNCell}[kind](5, 4)
    x, h, c = torch.randn(3, 5), torch.randn(3, 4), torch.randn(3, 4)
    named = {
        "input": x, "hx": [h, c] if kind == "lstm" else h, "w_ih": cell.weight_ih, "w_hh": cell.weight_hh,
        "b_ih": cell.bias_ih, "b_hh": cell.bias_hh,
    }  # fmt: skip
    with torch.inference_mode():
        odds = cell_odds(kind, named)
        expected = cell(x, (h, c))[0] if kind == "lstm" else cell(x, h)
    torch.testing.assert_close(unrolled(kind, odds[None], [h, c], h[None])[0], expected)

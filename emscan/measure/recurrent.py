"""The gates inside recurrent operators, which hand out only their outputs: recomputed from inputs and states.

LSTM: i, f, o = sigmoid(W x + U h + b), g = tanh(...). GRU: r, z = sigmoid(...), n = tanh(W x + b + r * (U h + c)).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_RUN: dict[str, Any] = {"lstm": torch.lstm, "gru": torch.gru, "tanh": torch.rnn_tanh, "relu": torch.rnn_relu}


def odds(
    kind: str, x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> Tensor:
    """Return the log-odds of every gate, (..., gates * hidden), rows as in ``w_ih``; plain energies for ``relu``.

    ``x``: (..., in), ``h``: (..., hidden) the state before. A tanh gate's odds are twice its argument.
    """
    a, b = F.linear(x, w_ih, b_ih), F.linear(h, w_hh, b_hh)
    if kind == "lstm":
        i, f, g, o = (a + b).chunk(4, -1)
        return torch.cat([i, f, 2 * g, o], -1)
    if kind == "gru":
        a_r, a_z, a_n = a.chunk(3, -1)
        b_r, b_z, b_n = b.chunk(3, -1)
        reset = a_r + b_r
        return torch.cat([reset, a_z + b_z, 2 * (a_n + torch.sigmoid(reset) * b_n)], -1)
    return a + b if kind == "relu" else 2 * (a + b)


def cell_odds(kind: str, named: dict[str, Any]) -> Tensor:
    """Return the odds of a cell operator's gates, (N, gates * hidden), from its arguments by schema name."""
    state = named["hx"]
    h = state[0] if isinstance(state, list | tuple) else state
    return odds(kind, named["input"], h, named["w_ih"], named["w_hh"], named.get("b_ih"), named.get("b_hh"))


def sequence_odds(kind: str, named: dict[str, Any]) -> Iterator[Tensor]:
    """Yield, per layer and direction, the odds of all gates, (T * N, gates * hidden), of a sequence operator.

    Every layer is run by torch's own operator; the states that it hands out are the states before the next step.
    """
    x, hx, params = named["input"], named["hx"], named["params"]
    layers, bias = int(named["num_layers"]), bool(named["has_biases"])
    both, first = bool(named["bidirectional"]), bool(named["batch_first"])
    states = list(hx) if isinstance(hx, list | tuple) else [hx]
    if x.dim() == 2:
        x, states = x.unsqueeze(0 if first else 1), [s.unsqueeze(1) if s.dim() == 2 else s for s in states]
    x = x.transpose(0, 1) if first else x
    directions = 2 if both else 1
    per = len(params) // (layers * directions)
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            own = list(params[index * per : (index + 1) * per])
            start = [s[index : index + 1].contiguous() for s in states]
            sequence = x.flip(0) if direction else x
            initial: Any = start if kind == "lstm" else start[0]
            out = _RUN[kind](sequence, initial, own, bias, 1, 0.0, False, False, False)[0]
            before = torch.cat([start[0][..., : out.shape[-1]], out[:-1]])
            w_ih, w_hh = own[:2]
            b_ih, b_hh = (own[2], own[3]) if bias else (None, None)
            yield odds(kind, sequence, before, w_ih, w_hh, b_ih, b_hh).flatten(0, 1)
            outputs.append(out.flip(0) if direction else out)
        x = torch.cat(outputs, -1)


def weights_of(named: dict[str, Any]) -> list[Tensor]:
    """Return the input weights (gates * hidden, in) of every layer and direction of a sequence operator."""
    params = named["params"]
    steps = 4 if bool(named["has_biases"]) else 2
    return list(params[::steps])

"""Evidence for gates inside recurrent operators: one step of the model's own operator, differentiated.

LSTM: c' = f c + i g, so dc'/dc = f, the forget gate's share as the operator has it. GRU without recurrent weights:
h' = (1 - z) n + z h, so dh'/dh = z. RNN with tanh: h' = r - (1 - r). With all energies negated the other side comes out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emscan.trace.graph import Call, Value, substitute
from emscan.trace.operators import RECURRENT

_ROWS = 64


def errors(call: Call) -> tuple[float, float, float] | None:
    """Return (sum error, gradient error, largest log-odds) of the gate that the step's derivative shows.

    None for a gate that has no two sides, and where the step's inputs were not kept.
    """
    kind = RECURRENT[call.op]
    if any(value.tensor is None for value in call.inputs):
        return None  # too large to keep
    x, h, weights = _first_step(call)
    if kind == "relu":
        return None
    on, off = _share(kind, x, h, weights, 1.0), _share(kind, x, h, weights, -1.0)
    odds = _odds(kind, x.double(), h.double(), [w.double() if w is not None else None for w in weights])
    with torch.enable_grad():
        u = odds.detach().clone().requires_grad_(True)
        (expected,) = torch.autograd.grad(torch.logaddexp(u, torch.zeros_like(u)).sum(), u)
    reach = float(odds.abs().clamp(max=30).max())
    return float((on + off - 1).abs().max()), float((on - expected).abs().max()), reach


def _first_step(call: Call) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Return input (N, in), hidden state (N, hidden) and [w_ih, w_hh, b_ih, b_hh] of the first layer's first step."""

    def number(leaf: Any) -> Any:
        return leaf.tensor.clone() if isinstance(leaf, Value) and leaf.tensor is not None else leaf

    names = [argument.name for argument in call.func._schema.arguments]
    named = dict(zip(names, substitute(call.args, number), strict=False)) | substitute(call.kwargs, number)
    state = named["hx"][0] if isinstance(named["hx"], list | tuple) else named["hx"]
    if "w_ih" in named:
        weights = [named["w_ih"], named["w_hh"], named.get("b_ih"), named.get("b_hh")]
        return named["input"][:_ROWS], state[:_ROWS], weights
    params = list(named["params"])
    bias = bool(named["has_biases"])
    weights = [*params[:2], *(params[2:4] if bias else (None, None))]
    if "batch_sizes" in named:  # packed: the first step is at the head of the data
        count = int(named["batch_sizes"][0])
        return named["data"][:count][:_ROWS], state[0][:_ROWS, : weights[1].shape[1]], weights
    x = named["input"]
    if x.dim() == 3:
        x, state = (x[:, 0] if named["batch_first"] else x[0]), state[0]
    else:
        x, state = x[:1], state[:1]
    return x[:_ROWS], state[:_ROWS, : weights[1].shape[1]], weights


def _share(kind: str, x: Tensor, h: Tensor, weights: list[Tensor | None], sign: float) -> Tensor:
    """Return the share that the operator's own step gives one side; ``sign`` -1 negates every energy."""
    w_ih, w_hh, b_ih, b_hh = weights
    assert w_ih is not None
    assert w_hh is not None
    x = sign * x
    biases = [sign * b if b is not None else None for b in (b_ih, b_hh)]
    with torch.enable_grad():
        if kind == "lstm":
            cell = torch.zeros(len(x), w_ih.shape[0] // 4, dtype=x.dtype, device=x.device, requires_grad=True)
            after = torch.lstm_cell(x, (sign * h, cell), w_ih, w_hh, *biases)[1]
            return torch.autograd.grad(after.sum(), cell)[0].double()
        if kind == "gru":
            state = torch.zeros(len(x), w_hh.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
            after = torch.gru_cell(x, state, w_ih, torch.zeros_like(w_hh), *biases)
            return torch.autograd.grad(after.sum(), state)[0].double()
    return (1 + torch.rnn_tanh_cell(x, sign * h, w_ih, w_hh, *biases).double()) / 2


def _odds(kind: str, x: Tensor, h: Tensor, weights: list[Tensor | None]) -> Tensor:
    w_ih, w_hh, b_ih, b_hh = weights
    assert w_ih is not None
    assert w_hh is not None
    if kind == "gru":
        h = torch.zeros_like(h)
    energies = F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)
    if kind == "tanh":
        return 2 * energies
    return energies.chunk(4 if kind == "lstm" else 3, -1)[1]

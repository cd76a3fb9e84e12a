"""Axes are followed by their origin: a network whose unit i always hands out i tells where every entry came from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from emscan.measure.layout import layout_of
from emscan.trace.axes import Axes
from emscan.trace.origins import RULES, rule
from emscan.trace.record import record

VIEWS = {
    "slice and split": lambda z: z[..., 24:].view(*z.shape[:2], 2, 12),
    "select after transpose": lambda z: z[..., 24:].view(*z.shape[:2], 2, 12).transpose(1, 2)[:, 1],
    "permute and index": lambda z: z.view(-1, 3, 16).permute(1, 0, 2)[2],
    "merge with samples": lambda z: z.view(*z.shape[:2], 4, 12).flatten(0, 2),
    "middle axis": lambda z: z.transpose(1, 2).reshape(-1, z.shape[1]),
    "every second": lambda z: z[..., ::2],
    "chunk, unflatten, slice": lambda z: z.chunk(2, -1)[1].unflatten(-1, (4, 6))[..., 2:5],
    "heads": lambda z: z.view(*z.shape[:2], 6, 8).transpose(1, 2),
    "heads merged with samples": lambda z: z.view(*z.shape[:2], 6, 8).transpose(1, 2).reshape(-1, z.shape[1], 8),
    "contiguous copy": lambda z: z.transpose(1, 2).contiguous().view(z.shape[0], 3, 16, z.shape[1]),
    "unbind": lambda z: z.view(*z.shape[:2], 3, 16).unbind(2)[1],
    "split sizes": lambda z: z.split([10, 38], -1)[1],
    "expand": lambda z: z[:, :1].expand(-1, 5, -1),
}


class Numbered(nn.Module):
    def __init__(self, view) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 48)
        self.view = view
        with torch.no_grad():
            self.fc.weight.zero_()
            self.fc.bias.copy_(torch.arange(48.0))

    def forward(self, x):
        return self.view(self.fc(x))


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("shape", [(2, 3, 4), (5, 7, 4)])
def test_units_behind_views(name: str, shape: tuple[int, ...]) -> None:
    model = Numbered(VIEWS[name])
    few = record(model, (torch.randn(2, 3, 4),), {}, budget=1 << 20)
    layout = layout_of(Axes(few).of(few.outputs[0]), ("fc.weight", "fc.bias"))
    tensor = model(torch.randn(shape)).detach()  # another number of samples and positions than discovery saw
    view = layout.view(tensor)
    others = [axis for axis in range(view.dim()) if axis not in layout.unit_dims]
    low, high = (view.amin(others), view.amax(others)) if others else (view, view)
    assert low.flatten().tolist() == high.flatten().tolist() == list(layout.rows)


def test_a_rule_is_registered_once() -> None:
    assert "aten.linear" in RULES
    with pytest.raises(ValueError, match="twice"):
        rule("linear")(lambda axes, call: None)


@pytest.mark.parametrize(("size", "stride", "same"), [(1, 1, True), (3, 1, False), (1, 2, False)])
def test_a_convolution_of_single_places_keeps_them(size: int, stride: int, same: bool) -> None:
    layer = nn.Conv1d(4, 6, size, stride, padding=size // 2)
    trace = record(layer, (torch.randn(2, 4, 8),), {}, budget=1 << 20)
    axes = Axes(trace)
    assert (axes.of(trace.outputs[0])[2] == axes.of(trace.inputs[0])[2]) == same

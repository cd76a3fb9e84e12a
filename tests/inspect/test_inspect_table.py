"""The table: what it shows, that it fits, and that nothing in a file steers the terminal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from emscan.inspect import inspect, words
from emscan.inspect.table import render_text

MODULE = """\
model.pt: a torch checkpoint (torch-module), 2,000 bytes, 4 tensors, 44
parameters
zip version       3
byteorder         little
class             torch.nn.modules.container.Sequential
modules           4: Linear x2, Sequential, ReLU
dtypes            float32

 Tensor    Dtype    Shape      Size
 ──────────────────────────────────
 0.weight  float32  5 x 3  60 bytes
 0.bias    float32  5      20 bytes
 2.weight  float32  4 x 5  80 bytes
 2.bias    float32  4      16 bytes

imports           8: torch.nn.modules.container.Sequential, builtins.set,
                  collections.OrderedDict, torch.nn.modules.linear.Linear,
                  torch._utils._rebuild_parameter,
                  torch._utils._rebuild_tensor_v2, torch.FloatStorage,
                  torch.nn.modules.activation.ReLU

To audit it: emscan audit model.pt"""


@pytest.fixture
def small(saved, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    saved(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)))
    found = inspect("model.pt")
    found.bytes = 2000  # torch's versions pad differently
    found.metadata.pop("format_version", None)
    return found


def test_snapshot_at_80_columns(small):
    assert render_text(small, 80) == MODULE


def test_a_refused_name_and_what_can_be_done(packed, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    packed(
        b"\x80\x02cnowhere\nNet\n)\x81}(X\x0b\x00\x00\x00_parameters}X\x08\x00\x00\x00_buffers}X\x08\x00\x00\x00_modules}ub."
    )
    assert render_text(inspect("model.pt"), 80).splitlines()[-7:] == [
        "imports           1: all refused",
        "refused           nowhere.Net: it is not on the safe list, and an object of it",
        "                  would be built",
        "",
        "To audit it, only if you trust where it comes from: emscan audit model.pt",
        "--trust",
        "Unpickling it would import nowhere.Net, which is not on the safe list.",
    ]


@pytest.mark.parametrize("width", [20, 30, 40, 50, 60, 72, 80, 100, 120, 200])
@pytest.mark.parametrize("everything", [False, True])
def test_no_line_is_wider_than_the_terminal(saved, width, everything):
    value = {f"model.layers.{i}.self_attention.query_key_value.weight": torch.zeros(3, i + 1) for i in range(30)}
    text = render_text(inspect(saved(value), check_values=True), width, everything=everything)
    assert max(map(len, text.splitlines())) <= width
    joined = "".join(text.split())
    assert ("and10moretensors(--allshowsthem)" in joined) != everything


def test_long_lists_are_cut_in_the_table_and_never_in_the_document(saved):
    found = inspect(saved({f"w{i}": torch.zeros(2) for i in range(300)}))
    assert "... and 280 more tensors (--all shows them)" in render_text(found, 80)
    assert "w299" not in render_text(found, 80)
    assert "w299" in render_text(found, 80, everything=True)
    assert len(found.to_dict()["tensors"]) == 300


def test_tensors_with_nan_come_first_where_the_list_is_cut(saved):
    value = {f"w{i}": torch.zeros(2) for i in range(40)} | {"last": torch.tensor([float("nan"), float("inf")])}
    text = render_text(inspect(saved(value), check_values=True), 80)
    rows = [line.split() for line in text.splitlines() if line.startswith((" w", " last"))]
    assert rows[0] == ["last", "float32", "2", "8", "bytes", "1", "1"]
    assert "1 tensor with NaN or Inf." in text


def test_control_characters_are_written_out(saved, raw):
    found = inspect(saved({"\x1b[31mred\nline": torch.ones(1), "args": {"\x07": 1}}))
    text = render_text(found, 100)
    assert "\x1b" not in text
    assert "\\x1b[31mred\\nline" in text
    path = raw('{"__metadata__":{"\\u001b]0;":"\\u202e[bold]"}}')
    text = render_text(inspect(path), 100)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[bold]" in text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"), (1, "1 bytes"), (9_999, "9,999 bytes"), (10_000, "10.0 kB"), (999_499, "999 kB"),
        (999_500, "1.00 MB"), (1_234_567_890, "1.23 GB"), (99_950_000_000, "100 GB"), (None, "-"),
    ],
)  # fmt: skip
def test_sizes(count, text):
    assert words.size(count) == text


def test_numbers():
    assert words.number(7_241_732_096) == "7.24 B"
    assert words.counted(1, "tensor") == "1 tensor"
    assert words.shape([]) == "scalar"
    assert words.shape(None) == "?"

"""Weights without an architecture: what their numbers and shapes say."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

from emscan.cli import app
from emscan.load.suggest import command
from emscan.report.schema import schema
from emscan.weights_only import examine


def rows_that_equal(tensor: Tensor) -> list[list[int]]:
    """Groups of equal rows that are not zero, by comparing all of them."""
    flat = tensor.reshape(len(tensor), -1)
    groups: dict[bytes, list[int]] = {}
    for i, row in enumerate(flat):
        if bool((row != 0).any()):
            groups.setdefault(row.view(torch.uint8).numpy().tobytes(), []).append(i)
    return sorted(group for group in groups.values() if len(group) > 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=30),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.sampled_from([(8,), (9,), (2, 5), (3, 3, 3)]),
)
def test_equal_and_zero_rows_are_found_exactly(picks: list[int], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    kinds = torch.cat([torch.zeros(1, *shape), torch.randn(3, *shape, generator=draw)]).to(dtype)
    tensor = kinds[picks]
    found = examine({"w": tensor, "b": torch.zeros(len(picks))})
    assert [one.rows for one in found.zero_rows] == ([[i for i, p in enumerate(picks) if p == 0]] if 0 in picks else [])
    assert sorted(group for one in found.duplicate_rows for group in one.groups) == rows_that_equal(tensor)


def test_rows_that_differ_in_one_bit_are_not_equal() -> None:
    tensor = torch.randn(1000, 64).repeat(2, 1)
    words = tensor.view(torch.int32)
    words[1000:, torch.randint(0, 64, (1000,))] ^= 1
    changed = [i for i in range(1000) if not torch.equal(words[i], words[1000 + i])]
    found = examine({"w": tensor}).duplicate_rows
    same = [[i, 1000 + i] for i in range(1000) if i not in changed]
    assert sorted(group for one in found for group in one.groups) == same


def test_short_rows_and_constants_are_no_copies() -> None:
    found = examine({"scale": torch.ones(64, 1, 1), "norm": torch.ones(64), "mask": torch.ones(8, 8, dtype=torch.bool)})
    assert not found.duplicate_rows
    assert not found.zero_rows
    assert not found.equal_tensors


def test_tensors_that_equal_each_other() -> None:
    w = torch.randn(20, 8)
    found = examine({"head": w, "embed": w.clone(), "other": w + 1, "wide": w.reshape(8, 20), "typed": w.double()})
    assert found.equal_tensors == [["head", "embed"]]


def test_numbers_that_are_not_finite_are_counted_in_every_type() -> None:
    weights = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.complex64):
        tensor = torch.zeros(4, 4, dtype=torch.complex64 if dtype.is_complex else torch.float32)
        tensor[0, 1], tensor[2, 2], tensor[3, 3] = torch.nan, torch.inf, -torch.inf
        weights[str(dtype)] = tensor.to(dtype)
    weights["fine"] = torch.randn(3)
    found = examine(weights)
    assert [(one.name, one.nan, one.inf) for one in found.not_finite] == [(n, 1, 2) for n in weights if n != "fine"]


def test_empty_scalar_and_odd_tensors() -> None:
    found = examine({
        "empty": torch.empty(0, 4), "none": torch.empty(4, 0), "scalar": torch.tensor(3.0), "ids": torch.arange(9),
        "strided": torch.randn(16, 16).t(),
    })  # fmt: skip
    assert found.tensors == 5
    assert found.bytes == 4 + 9 * 8 + 16 * 16 * 4


class Block(nn.Module):
    def __init__(self, experts: int, *, stacked: bool) -> None:
        super().__init__()
        self.chooser = nn.Linear(16, experts, bias=False)
        if stacked:
            self.banks = nn.Parameter(torch.randn(experts, 16, 32))
        else:
            self.banks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.ReLU()) for _ in range(experts))
        self.dense = nn.Linear(16, 40)


@pytest.mark.parametrize("stacked", [True, False])
def test_a_router_by_the_shapes_beside_it(stacked: bool) -> None:
    model = nn.Sequential(Block(6, stacked=stacked), nn.Linear(40, 6))
    hints = [hint for hint in examine(model.state_dict()).hints if hint.could_be == "router"]
    assert [hint.name for hint in hints] == ["0.chooser.weight"]
    assert "6 rows beside" in hints[0].why


def test_a_codebook_by_its_running_averages() -> None:
    weights = {
        "q.a": torch.randn(32, 8),
        "q.n": torch.rand(32),
        "q.s": torch.randn(32, 8),
        "enc.weight": torch.ones(32, 8),
    }
    hints = {hint.name: hint.could_be for hint in examine(weights).hints}
    assert hints == {"q.a": "codebook with running averages", "enc.weight": "embedding, codebook or layer without bias"}


def test_the_command_names_the_class_that_has_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets.py").write_text(
        "raise SystemExit('never run')\n"
        "class Other(Base):\n    def __init__(self):\n        self.a = 1\n"
        "class Big(Base):\n    def __init__(self):\n        self.a, self.b, self.c = 1, 2, 3\n"
        "class Fits(Base):\n    def __init__(self, width, depth=2, *, act):\n        self.a = 1\n"
        "        self.register_buffer('b', None)\n"
    )
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "folder.py").mkdir()
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / "my weights.pt")
    place = f"{tmp_path / 'nets.py'}:Fits"
    assert command(path, ["a.weight", "b"]) == (
        f"emscan audit '{path}' --model {place} --model-arg width=... --model-arg act=..."
    )
    assert command(path, ["a.weight", "z"]) == f"emscan audit '{path}' --model file.py:callable"


def test_the_report(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    weights = {"embed.weight": torch.randn(40, 8), "fc.weight": torch.randn(3, 8), "fc.bias": torch.zeros(3)}
    weights["embed.weight"][2] = 0
    weights["embed.weight"][7] = weights["embed.weight"][3]
    weights["fc.weight"][0, 0] = torch.nan
    torch.save(weights, path)
    done = CliRunner().invoke(app, ["audit", str(path), "--format", "json"])
    assert done.exit_code == 3
    document = json.loads(done.stdout)
    jsonschema.validate(document, schema())
    found = document["weights"]
    assert found["zero_rows"] == [{"name": "embed.weight", "count": 40, "rows": [2]}]
    assert found["duplicate_rows"] == [{"name": "embed.weight", "count": 40, "groups": [[3, 7]]}]
    assert found["not_finite"] == [{"name": "fc.weight", "nan": 1, "inf": 0}]
    assert found["command"] == f"emscan audit {path} --model file.py:callable"
    assert document["summary"]["status"] == "inconclusive"
    assert [finding["rule"] for finding in document["findings"]] == ["EM302", "EM902"]
    failing = CliRunner().invoke(app, ["audit", str(path), "--fail-on", "error"])
    assert failing.exit_code == 1


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_table_fits_and_says_everything(tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(width))
    torch.save({"embed": torch.zeros(40, 8), "copies": torch.randn(2, 8).repeat(9, 1)}, "w.pt")
    text = CliRunner().invoke(app, ["audit", "w.pt"]).stdout
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    assert "WEIGHTS ONLY" in words
    assert "40 of 40: 0, 1, 2, 3, 4, 5, +34 more" in words
    assert "18 of 18: 0 = 2 = 4 = 6 = 8 = 10; 1 = 3 = 5 = 7 = 9 = 11, ..." in words
    assert "emscan audit w.pt --model file.py:callable" in words

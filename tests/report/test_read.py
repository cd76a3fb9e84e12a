"""A saved report comes back as it was; anything else gives one line that says where it is wrong."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from emscan.errors import ReportError
from emscan.report import read
from emscan.report.document import Misfit, Mismatch, NotFinite, Temperature, WeightsOnly
from emscan.report.formats import FORMATS
from emscan.report.read import parse_reports, read_report, read_reports
from tests.report.builder import gate, report, seed, softmax
from tests.report.formats.samples import mixed

DOCUMENT = seed().to_dict()


def full():
    """A report with every kind of part."""
    made = mixed()
    made.layers[2].responsibility.temperature = Temperature(0.1, 0.2, 3)
    made.model.partial = Misfit(3, ["a"], ["b"], [Mismatch("c", [1, 2], [2, 1])])
    made.model.arguments = {"depth": 2, "names": ["x", None], "nested": {"a": [1.5, True]}}
    made.weights = WeightsOnly(1, 8, {"float32": 1}, not_finite=[NotFinite("w", 1, 0)])
    made.layers[0].components.copies = [[0, 1], [2, 3]]
    return made


@pytest.mark.parametrize("made", [seed(), seed(synthetic=True), report(), full()])
def test_round_trip(made, tmp_path: Path) -> None:
    text = FORMATS["json"].render(made)
    (tmp_path / "r.json").write_text(text)
    back = read_report(tmp_path / "r.json")
    assert back == made
    assert FORMATS["json"].render(back) == text


def test_every_file_of_several_reports_too(tmp_path: Path) -> None:
    made = [seed(), full()]
    (tmp_path / "r.json").write_text(FORMATS["json"].render_many(made))
    assert read_reports(tmp_path / "r.json") == made
    with pytest.raises(ReportError, match="holds 2 reports, one is needed"):
        read_report(tmp_path / "r.json")
    assert parse_reports(b"[]", "x") == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_any_unicode_encoding_is_read(encoding: str) -> None:
    """PowerShell's > writes UTF-16."""
    assert parse_reports(FORMATS["json"].render(seed()).encode(encoding), "x") == [seed()]


def test_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(FORMATS["json"].render(seed()).encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert read_report("-") == seed()


def test_what_a_newer_version_added_is_ignored_with_a_note() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["layers"][0]["colour"] = document["layers"][1]["colour"] = {"deep": [1]}
    document["later"] = 1
    notes: list[str] = []
    assert parse_reports(json.dumps(document).encode(), "r.json", notes.append) == [seed()]
    assert notes == ["r.json: ignored what this version of emscan does not know: later, layers[].colour"]
    notes.clear()
    parse_reports(json.dumps(DOCUMENT).encode(), "r.json", notes.append)
    assert not notes


def test_what_an_older_version_lacked_has_its_default() -> None:
    document = copy.deepcopy(DOCUMENT)
    del document["weights"], document["layers"][0]["source"], document["findings"][0]["suppressed"]
    document["thresholds"].pop("information")
    assert parse_reports(json.dumps(document).encode(), "x") == [seed()]


def failure(data: bytes) -> str:
    with pytest.raises(ReportError) as caught:
        parse_reports(data, "r.json")
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 300
    assert line.endswith("; write one with `emscan audit MODEL --format json --output FILE`")
    return line.partition(";")[0]


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", "r.json is no report: it is no JSON (it is empty)"),
        (b"  \n", "r.json is no report: it is no JSON (it is empty)"),
        (b"{", "r.json is no report: it is no JSON (line 1, column 2)"),
        (b"PK\x03\x04\xff\xfe\xfd", "r.json is no report: it is no text"),
        (b"[" * 200_000, "r.json is no report: it is nested too deep"),
        (b'{"a":' * 200_000, "r.json is no report: it is nested too deep"),
        (b"3", "r.json is no report: it has no schema_version"),
        (b"[3]", "r.json is no report: [0] has no schema_version"),
        (b"{}", "r.json is no report: it has no schema_version"),
        (b'{"schema_version": 2}', "r.json is no report: schema_version is 2, this emscan reads 1"),
        (b'{"schema_version": true}', "r.json is no report: schema_version is true, this emscan reads 1"),
        (b'{"schema_version": 1}', "r.json is no report: has no tool"),
        (b'{"schema_version": NaN}', "r.json is no report: it has NaN for a number"),
        (b'{"schema_version": ' + b"1" * 10_000 + b"}", None),
    ],
)
def test_files_that_hold_something_else(data: bytes, line: str | None) -> None:
    found = failure(data)
    assert found.startswith("r.json is no report: ") if line is None else found == line


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("layers", 0, "verdict"), "maybe", 'layers[0].verdict is "maybe", none of em, soft, hard, none'),
        (("layers", 0, "verdict"), ["em"], "layers[0].verdict is a list, none of em, soft, hard, none"),
        (("layers", 1, "name"), 3, "layers[1].name is 3, not text"),
        (("layers", 1, "name"), None, "layers[1].name is null, not text"),
        (("layers", 0, "calls"), True, "layers[0].calls is true, not a whole number"),
        (("layers", 0, "calls"), 1.0, "layers[0].calls is 1.0, not a whole number"),
        (("layers", 0, "calls"), 0, "layers[0].calls is 0, below 1"),
        (("layers", 0), [], "layers[0] is a list, not an object"),
        (("layers",), {}, "layers is an object, not a list"),
        (("layers", 0, "components", "dead", 0), "1", 'layers[0].components.dead[0] is "1", not a whole number'),
        (("layers", 0, "components", "on_rate", 2), 1.5, "layers[0].components.on_rate[2] is 1.5, above 1"),
        (("layers", 0, "components", "on_rate"), 1.5, "layers[0].components.on_rate is 1.5, not a list"),
        (("thresholds", "rare"), "x" * 99, f'thresholds.rare is "{"x" * 39}..., not a number'),
        (("thresholds", "rare"), 10**400, "thresholds.rare is a number too large, not a number"),
        (("model", "sha256"), "abc", 'model.sha256 is "abc", not as ^[0-9a-f]{64}$'),
        (("findings", 0, "rule"), "EM101\n", 'findings[0].rule is "EM101\\n", not as ^EM[0-9]{3}$'),
        (("tool", "name"), 1, "tool.name is 1, not text"),
        (("tool",), {"name": "emscan"}, "tool has no version"),
    ],
)
def test_wrong_values_are_named_by_their_place(path, value, said: str) -> None:
    document = copy.deepcopy(DOCUMENT)
    holder = document
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value
    assert failure(json.dumps(document).encode()) == f"r.json is no report: {said}"


def test_a_number_too_large_for_a_float_is_none() -> None:
    text = json.dumps(DOCUMENT).replace('"rare": 0.01', '"rare": 1e999')
    assert failure(text.encode()) == "r.json is no report: thresholds.rare is a number too large, not a number"


def test_free_form_parts_may_not_be_deep_or_infinite() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["environment"]["a"] = nested = []
    for _ in range(100):
        nested.append([])
        nested = nested[0]
    assert failure(json.dumps(document).encode()).endswith("is nested too deep")
    text = json.dumps(DOCUMENT).replace('"threads": 1', '"threads": 1e999')
    assert "environment.threads is a number too large" in failure(text.encode())


def test_paths_that_are_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, said in (
        (tmp_path / "gone.json", "cannot read .*: No such file or directory"),
        (tmp_path, "is a folder, no report"),
        (Path("/dev/zero"), "is no file"),
        ("a\0b", "cannot read"),
    ):
        with pytest.raises(ReportError, match=said):
            read_report(path)
    monkeypatch.setattr(read, "MOST_BYTES", 10)
    (tmp_path / "r.json").write_text("{} " * 10)
    with pytest.raises(ReportError, match="is larger than"):
        read_report(tmp_path / "r.json")


def test_reading_does_not_import_torch() -> None:
    code = "import sys, emscan.report.read, emscan.report.formats; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert ran.stdout.strip() == "False"


def test_a_softmax_row_keeps_its_heads() -> None:
    made = report(softmax(0, "head"), gate(1, "a"))
    (back,) = parse_reports(FORMATS["json"].render(made).encode(), "x")
    assert back.layers[0].responsibility.heads == made.layers[0].responsibility.heads

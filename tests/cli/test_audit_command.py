"""The command line: exit statuses, what goes where, and one line for every failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from emscan.report.schema import schema

ROOT = Path(__file__).parent.parent.parent
MODEL = str(ROOT / "fixtures" / "relu_mlp.pt")
PROBE = str(ROOT / "fixtures" / "digits.safetensors")


def emscan(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "emscan", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80", **environment},
    )


def failed(ran: subprocess.CompletedProcess[str]) -> str:
    """Return the message of a failure after checking that it is one: status 2, one line, nothing on stdout."""
    assert ran.returncode == 2
    assert not ran.stdout
    lines = [line for line in ran.stderr.splitlines() if "note:" not in line]
    assert len(lines) == 1, ran.stderr
    assert lines[0].startswith("emscan: error: ")
    return lines[0]


@pytest.fixture(scope="module")
def document() -> dict:
    ran = emscan("audit", MODEL, "--probe", PROBE, "--format", "json")
    assert ran.returncode == 0
    assert not ran.stderr
    return json.loads(ran.stdout)


def test_json_on_stdout_is_one_document_that_the_schema_accepts(document: dict) -> None:
    jsonschema.Draft202012Validator(schema()).validate(document)
    printed = emscan("schema")
    assert json.loads(printed.stdout) == schema()


def test_the_fixture_has_the_dead_units_that_training_left(document: dict) -> None:
    """Against a float64 forward pass with hooks."""
    import safetensors.torch

    from emscan.load import load

    model = load(MODEL).module.double()
    x = safetensors.torch.load_file(PROBE)["images"].double()
    dead = {}
    for name, layer in model.named_children():
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            dead[str(int(name) - 1)] = (x.amax(0) == 0).nonzero().flatten().tolist()
    found = {row["name"]: row["components"]["dead"] for row in document["layers"] if row["verdict"] == "hard"}
    assert found == dead
    assert sum(map(len, dead.values())) > 0
    assert document["summary"]["dead"] == sum(map(len, dead.values()))


def test_status_1_only_by_fail_on() -> None:
    assert emscan("audit", MODEL, "--probe", PROBE, "--fail-on", "error").returncode == 0
    assert emscan("audit", MODEL, "--probe", PROBE, "--fail-on", "EM101").returncode == 1
    assert emscan("audit", MODEL, "--probe", PROBE, "--fail-on", "warning").returncode == 1
    assert emscan("audit", MODEL, "--probe", PROBE, "--fail-on", "EM105", "--fail-on", "em102").returncode == 0


def test_weights_without_an_architecture_are_inconclusive(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.randn(3, 4)}, tmp_path / "w.safetensors")
    ran = emscan("audit", tmp_path / "w.safetensors", "--format", "json")
    assert ran.returncode == 3
    found = json.loads(ran.stdout)
    assert found["summary"]["status"] == "inconclusive"
    assert found["layers"] == []
    assert "--model" in found["findings"][0]["help"]
    assert emscan("audit", tmp_path / "w.safetensors", "--fail-on", "note").returncode == 1


def test_an_unknown_operator_is_inconclusive(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "library = torch.library.Library('odd_kernels', 'DEF')\n"
        "library.define('blend(Tensor x) -> Tensor')\n"
        "library.impl('blend', lambda x: x.softmax(-1), 'CompositeExplicitAutograd')\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(4, 3)\n"
        "    def forward(self, x):\n"
        "        return torch.ops.odd_kernels.blend(self.fc(x))\n"
    )
    save_file({"fc.weight": torch.randn(3, 4), "fc.bias": torch.zeros(3)}, tmp_path / "w.safetensors")
    ran = emscan("audit", tmp_path / "w.safetensors", "--model", f"{tmp_path}/net.py:Net", "--format", "json")
    assert ran.returncode == 3
    found = json.loads(ran.stdout)
    (unknown,) = found["coverage"]["unclassified"]
    assert (unknown["op"], unknown["calls"]) == ("odd_kernels.blend", 1)
    assert unknown["where"].endswith("net.py:11")
    assert [row["verdict"] for row in found["layers"]] == ["none"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("missing.pt",), "missing.pt"),
        ((str(ROOT),), "cannot load"),
        ((MODEL, "--probe", "nowhere.safetensors"), "nowhere.safetensors"),
        ((MODEL, "--fail-on", "EM999"), "did you mean"),
        ((MODEL, "--objective", "magic"), "use one of"),
        ((MODEL, "--format", "xml"), "use one of"),
        ((MODEL, "--max-memory", "lots"), "is no size"),
        ((MODEL, "--max-memory", "1K", "--probe", PROBE), "--max-memory"),
        ((MODEL, "--batch-size", "0"), "--batch-size"),
        ((MODEL, "--rare", "7"), "--rare"),
        ((MODEL, "--output", "no/such/folder/x.json"), "no such folder"),
        ((MODEL, "--device", "toaster"), "toaster"),
        ((str(ROOT / "README.md"),), "cannot load"),
        ((str(ROOT / "fixtures" / "transformer.ts"),), "--trust"),
    ],
)
def test_failures_are_one_line_and_status_2(arguments: tuple[str, ...], words: str) -> None:
    assert words in failed(emscan("audit", *arguments))


def test_a_probe_that_does_not_fit_says_so(tmp_path: Path) -> None:
    save_file({"x": torch.randn(5, 63)}, tmp_path / "p.safetensors")
    line = failed(emscan("audit", MODEL, "--probe", tmp_path / "p.safetensors"))
    assert "takes 64 features, the probe's input has 63" in line


def test_usage_errors_have_status_2() -> None:
    for arguments in (("audit",), ("audit", MODEL, "--no-such-option"), ("nonsense",), ("audit", MODEL, "--seed", "x")):
        ran = emscan(*arguments)
        assert ran.returncode == 2
        assert not ran.stdout
        assert "Traceback" not in ran.stderr


def test_an_internal_error_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from emscan import cli, pipeline

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a\nb")

    monkeypatch.setattr(pipeline, "run", broken)
    monkeypatch.setattr(sys, "argv", ["emscan", "audit", MODEL, "--probe", PROBE])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith("emscan: internal error: RuntimeError: a b")


def test_output_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text("kept")
    assert emscan("audit", "missing.pt", "--format", "json", "--output", target).returncode == 2
    assert target.read_text() == "kept"
    ran = emscan("audit", MODEL, "--probe", PROBE, "--format", "json", "--output", target)
    assert ran.returncode == 0
    assert not ran.stdout
    assert json.loads(target.read_text())["schema_version"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json"]


def test_without_a_probe_everything_is_flagged_synthetic() -> None:
    ran = emscan("audit", MODEL)
    assert ran.returncode == 0
    assert "SYNTHETIC PROBE" in ran.stdout
    assert "indicative" in ran.stdout
    assert json.loads(emscan("audit", MODEL, "--format", "json").stdout)["probe"]["synthetic"] is True


def test_a_pipe_gets_no_color_and_no_wider_than_asked() -> None:
    ran = emscan("audit", MODEL, "--probe", PROBE)
    assert "\x1b" not in ran.stdout
    assert max(map(len, ran.stdout.splitlines())) <= 80


def test_what_the_models_code_prints_stays_off_stdout(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self):\n"
        "        super().__init__(4, 3)\n"
        "    def forward(self, x):\n"
        "        print('hello')\n"
        "        return super().forward(x)\n"
    )
    save_file({"weight": torch.randn(3, 4), "bias": torch.zeros(3)}, tmp_path / "w.safetensors")
    ran = emscan("audit", tmp_path / "w.safetensors", "--model", f"{tmp_path}/net.py:Net", "--format", "json")
    json.loads(ran.stdout)
    assert "hello" in ran.stderr


def test_trust_is_written_into_the_report() -> None:
    arguments = ("audit", "fixtures/transformer.ts", "--probe", "fixtures/digits_rows.safetensors", "--format", "json")
    assert emscan(*arguments).returncode == 2
    found = json.loads(emscan(*arguments, "--trust").stdout)
    assert found["model"]["trusted"] is True


@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), ("audit", "--help"), ("rule",), ("rule", "EM101"), ("schema",)]
)
def test_light_commands_do_not_import_torch(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys; sys.argv = ['emscan', *sys.argv[1:]]\n"
        "from emscan.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout


def test_rules_are_listed_and_explained() -> None:
    assert "EM101  warning  dead-unit" in emscan("rule").stdout
    assert "What to do:" in emscan("rule", "dead-unit").stdout
    assert "did you mean EM108?" in failed(emscan("rule", "EM1O8"))

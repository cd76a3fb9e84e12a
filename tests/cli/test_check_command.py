"""`emscan check`: a policy over one or many real checkpoints, its outcomes and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emscan.report.read import read_reports
from tests.cli.inprocess import Emscan, emscan

__all__ = ["emscan"]

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
RELU, PROBE = FIXTURES / "relu_mlp.pt", FIXTURES / "digits.safetensors"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository to work in."""
    (tmp_path / ".git").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def policy(text: str) -> None:
    Path("emscan.toml").write_text(f'probe = "{PROBE}"\n{text}')


def test_without_a_policy_warnings_fail(emscan: Emscan) -> None:
    ran = emscan("check", RELU, "--probe", PROBE)
    assert ran.status == 1
    lines = ran.out.splitlines()
    assert lines[0] == f"{RELU}: 3 findings"
    assert lines[1].startswith("  EM101 warning layer 0: 16 of 64 units are dead on this probe of 450 samples")
    assert lines[2].startswith("    indices: 0, 4, 6, 15, ")
    assert ran.out.endswith("Policy: none; `emscan init MODEL` writes one that starts from what is there.\n")


def test_every_outcome_is_counted_apart(emscan: Emscan, project: Path) -> None:
    policy(
        'skip = ["*.onnx"]\n[[checkpoint]]\npath = "relu.pt"\nmax-dead = "30%"\n'
        '[[checkpoint]]\npath = "quiet.pt"\nignore = ["EM1"]\n'
    )
    for name in ("relu.pt", "quiet.pt", "loud.pt"):
        (project / name).write_bytes(RELU.read_bytes())
    (project / "broken.pt").write_bytes(RELU.read_bytes()[:500])
    (project / "a.onnx").write_bytes(b"\x08\x07\x12\x07pytorch")
    save_file({"fc.weight": torch.randn(3, 4)}, project / "weights.safetensors")
    names = ("relu.pt", "quiet.pt", "loud.pt", "broken.pt", "a.onnx", "weights.safetensors")
    ran = emscan("check", *names, "--also", "json=r.json", "--also", "junit=r.xml")
    assert ran.status == 2
    outcome = {line.split(":")[0]: line.split(": ")[1] for line in ran.out.splitlines() if line.startswith(names)}
    assert outcome == {
        "relu.pt": "clean",
        "quiet.pt": "suppressed only (4 suppressed)",
        "loud.pt": "3 findings",
        "broken.pt": "failed",
        "a.onnx": "skipped",
        "weights.safetensors": "inconclusive (nothing was classified)",
    }
    sums = "6 models: 1 with findings, 1 failed, 1 inconclusive, 1 suppressed only, 1 skipped, 1 clean."
    assert f"{sums} 3 findings, 4 suppressed." in " ".join(ran.out.split())
    assert "emscan: error: cannot load broken.pt" in ran.err
    assert [report.model.path for report in read_reports("r.json")] == ["relu.pt", "quiet.pt", "loud.pt", names[-1]]
    assert 'name="broken.pt"' in Path("r.xml").read_text()


def test_the_order_of_exit_statuses(emscan: Emscan, project: Path) -> None:
    policy('max-dead = "30%"')
    save_file({"fc.weight": torch.randn(3, 4)}, project / "weights.safetensors")
    assert emscan("check", RELU).status == 0
    assert emscan("check", RELU, "weights.safetensors").status == 3
    assert emscan("check", RELU, "weights.safetensors", "--max-dead", "0").status == 1
    assert emscan("check", RELU, "weights.safetensors", "gone.pt", "--max-dead", "0").status == 2


def test_what_is_not_supported_fails_unless_it_may_be_skipped(emscan: Emscan, project: Path) -> None:
    (project / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    (project / "notes.pt").write_text("plain text")
    assert emscan("check", "model.gguf").status == 2
    ran = emscan("check", "model.gguf", "--skip-unsupported")
    assert (ran.status, ran.out.splitlines()[0]) == (
        0,
        "model.gguf: skipped: it is a GGUF model, which emscan does not read",
    )
    assert emscan("check", "notes.pt", "--skip-unsupported").status == 2  # that is no model at all


def test_patterns_in_quotes_are_expanded_and_paths_checked_once(emscan: Emscan, project: Path) -> None:
    policy('max-dead = "30%"')
    (project / "run").mkdir()
    for name in ("a.pt", "b.pt"):
        (project / "run" / name).write_bytes(RELU.read_bytes())
    ran = emscan("check", "run/*.pt", "run/a.pt", "none/*.pt")
    assert ran.status == 2
    assert [line for line in ran.out.splitlines() if line.startswith("run/")] == ["run/a.pt: clean", "run/b.pt: clean"]
    assert "cannot load none/*.pt: there is no such file" in ran.err


def test_what_matched_nothing_is_a_note(emscan: Emscan) -> None:
    policy('max-dead = "30%"\nignore = ["EM402"]\n[[layer]]\npattern = "encoder.*"\nmax-dead = 0\n')
    ran = emscan("check", RELU)
    assert ran.status == 0
    assert ran.err.splitlines() == [
        "emscan: note: emscan.toml:4: no layer matches encoder.*",
        "emscan: note: emscan.toml:3: ignore EM402 matches no finding",
    ]


def test_options_environment_file(emscan: Emscan, project: Path) -> None:
    policy('max-dead = "10%"')
    assert emscan("check", RELU).status == 1
    assert emscan("check", RELU, EMSCAN_MAX_DEAD="30%").status == 0
    assert emscan("check", RELU, "--max-dead", "5%", EMSCAN_MAX_DEAD="30%").status == 1
    (project / "other.toml").write_text(f'probe = "{PROBE}"\nmax-dead = "30%"\n')
    assert emscan("check", RELU, "--config", "other.toml").status == 0
    assert emscan("check", RELU, EMSCAN_CONFIG="other.toml").status == 0
    assert emscan("check", RELU, "--no-config", "--probe", PROBE).out.count("EM101") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-dead", "much"], "--max-dead 'much'; write a share"),
        (["--ignore", "dead-unt"], "--ignore ['dead-unt']; no rule 'dead-unt'; did you mean dead-unit?"),
        (["--format", "yaml"], "--format yaml: no such choice"),
        (["--also", "junit"], "--also junit: no file"),
        (["--also", "yaml=x"], "--also yaml: no such choice"),
        (["--config", "x.toml"], "cannot read x.toml"),
        (["--config", "x.toml", "--no-config"], "contradict"),
        (["--update-baseline"], "--update-baseline needs one file"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line(emscan: Emscan, arguments: list[str], message: str) -> None:
    ran = emscan("check", RELU, *arguments)
    assert (ran.status, ran.out, len(ran.err.splitlines())) == (2, "", 1)
    assert message in ran.err


def test_a_wrong_environment_is_one_line(emscan: Emscan) -> None:
    ran = emscan("check", RELU, EMSCAN_MAX_DED="1")
    assert ran.status == 2
    assert ran.err == "emscan: error: environment: EMSCAN_MAX_DED is no setting; did you mean EMSCAN_MAX_DEAD?\n"


def test_audit_reads_no_policy(emscan: Emscan) -> None:
    policy("max-dead = 0\n[thresholds]\nrare = 0.9\n")
    found = json.loads(emscan("audit", RELU, "--probe", PROBE, "--format", "json", EMSCAN_RARE="0.9").out)
    assert found["thresholds"]["rare"] == 0.01
    assert found["policy"] is None


def test_thresholds_of_the_policy_are_those_of_the_report(emscan: Emscan) -> None:
    policy('max-dead = "30%"\n[thresholds]\nrare = "20%"\n')
    found = json.loads(emscan("check", RELU, "--format", "json").out)
    assert found["thresholds"]["rare"] == 0.2
    assert found["policy"]["limits"] == [{"name": "max-dead", "value": 0.3, "share": True, "layers": None}]


def test_a_model_that_fails_in_its_own_code_does_not_stop_the_others(emscan: Emscan, project: Path) -> None:
    (project / "net.py").write_text(
        "import sys\nfrom torch import nn\nclass Net(nn.Linear):\n"
        "    def __init__(self):\n        super().__init__(4, 3)\n    def forward(self, x):\n        sys.exit(0)\n"
    )
    save_file({"weight": torch.randn(3, 4), "bias": torch.zeros(3)}, project / "net.safetensors")
    policy('max-dead = "30%"\n[[checkpoint]]\npath = "net.safetensors"\nmodel = "net.py:Net"\nprobe = "random"\n')
    ran = emscan("check", "net.safetensors", RELU)
    assert ran.status == 2
    assert f"{RELU}: clean" in ran.out
    assert "exit(0)" in ran.err


def test_a_series_that_degrades_fails_from_the_checkpoint_on_in_which_it_does(emscan: Emscan, project: Path) -> None:
    """Units of one layer die one after the other, in real weights."""
    (project / "nets.py").write_text((FIXTURES / "models.py").read_text())
    weights = load_file(FIXTURES / "conv.safetensors")
    for step in range(4):
        worse = {name: value.clone() for name, value in weights.items()}
        worse["conv2.bias"][: 2 * step] = -100.0
        worse["conv2.weight"][: 2 * step] = 0.0
        save_file(worse, project / f"step{step}.safetensors")
    images = FIXTURES / "digits_images.safetensors"
    assert emscan("init", "step0.safetensors", "--model", "nets.py:ConvNet", "--probe", images).status == 0
    statuses = [emscan("check", f"step{step}.safetensors").status for step in range(4)]
    assert statuses == [0, 1, 1, 1]
    found = emscan("check", "step3.safetensors").out
    assert "layer conv2: " in found
    assert "layer conv1: " not in found


def test_help_does_not_import_torch() -> None:
    code = "import sys\nsys.argv = ['emscan', 'check', '--help']\nfrom emscan.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit:\n    pass\nprint('torch' in sys.modules, 'rich' in sys.modules)\n"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.splitlines()[-1] == "False False"
    assert "--max-dead" in ran.stdout


def test_a_baseline_lets_only_what_is_new_or_worse_count(emscan: Emscan, project: Path) -> None:
    """Known dead units do not count; one unit more does, and its layer alone is named."""
    policy('baseline = ["known.json"]\n')
    (project / "a.pt").write_bytes(RELU.read_bytes())
    (project / "b.pt").write_bytes(RELU.read_bytes())
    assert "no baseline known.json" in emscan("check", "a.pt").err
    ran = emscan("check", "a.pt", "b.pt", "--update-baseline")
    assert (ran.status, "wrote the baseline known.json (2 checked)" in ran.err) == (0, True)
    ran = emscan("check", "a.pt", "b.pt")
    assert (ran.status, ran.out.splitlines()[0]) == (0, "a.pt: suppressed only (4 suppressed)")
    from emscan.load import load

    model = load("a.pt").module
    assert model is not None
    with torch.no_grad():
        model.get_submodule("2").bias[0] = -100.0
    torch.save(model, project / "a.pt")
    ran = emscan("check", "a.pt", "b.pt")
    assert ran.status == 1
    assert [line for line in ran.out.splitlines() if "EM101" in line] == [
        "  EM101 warning layer 2: 9 of 48 units are dead on this probe of 450 samples"
    ]
    assert emscan("check", "a.pt", "--update-baseline").status == 0  # b.pt stays in it
    assert [report.model.path for report in read_reports("known.json")] == ["a.pt", "b.pt"]
    assert emscan("check", "a.pt", "b.pt").status == 0


def test_an_update_of_the_baseline_does_not_hide_a_failure(emscan: Emscan) -> None:
    policy('baseline = ["known.json"]\n')
    assert emscan("check", RELU, "gone.pt", "--update-baseline").status == 2
    assert len(read_reports("known.json")) == 1

"""`emscan render`, and the formats of `emscan audit`: what goes where, without torch, in Actions and outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from emscan.cli.writing import FORMAT_NAMES
from emscan.report.formats import FORMATS
from tests.cli.test_audit_command import MODEL, PROBE, emscan, failed
from tests.report.builder import seed
from tests.report.formats.samples import mixed
from tests.report.formats.test_formats import CHECKED

OUTSIDE = {"GITHUB_ACTIONS": "", "GITHUB_STEP_SUMMARY": "", "GITHUB_WORKSPACE": "", "CI_PROJECT_DIR": ""}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "report.json"
    path.write_text(FORMATS["json"].render(mixed()))
    return path


def here(folder: Path, *arguments: object, stdin: str | None = None, **environment: str):
    """Run in a folder, with torch out of reach."""
    (folder / "torch.py").write_text("raise ImportError('torch was imported')")
    return subprocess.run(
        [sys.executable, "-m", "emscan", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **OUTSIDE, "COLUMNS": "80", "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        input=stdin.encode() if stdin is not None else None,
        timeout=60,
    )


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_every_format_without_torch(name: str, saved: Path) -> None:
    ran = here(saved.parent, "render", saved, "--format", name)
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr
    if name in CHECKED:
        CHECKED[name](ran.stdout.decode() if name == "csv" else ran.stdout.decode().rstrip("\n"))
    if name == "json":
        assert ran.stdout.decode() == saved.read_text() + "\n"
    out = saved.parent / "out"
    assert here(saved.parent, "render", saved, "--format", name, "--output", out).returncode == 0
    assert out.read_bytes() == ran.stdout or name == "table"


def test_several_reports_and_stdin(saved: Path) -> None:
    ran = here(saved.parent, "render", saved, "-", "--format", "junit", stdin=FORMATS["json"].render(seed()))
    root = CHECKED["junit"](ran.stdout.decode())
    assert [suite.get("name") for suite in root] == ["runs/step 1/model.pt", "model.pt"]
    ran = here(saved.parent, "render", saved, saved)
    assert ran.stdout.decode().count("runs/step 1/model.pt: torch-module") == 2


def test_rows_can_be_chosen(saved: Path) -> None:
    for name in ("table", "markdown"):
        ran = here(saved.parent, "render", saved, "--layer", "head", "--format", name)
        assert "1 of 5 layers shown" in ran.stdout.decode()
    ran = here(saved.parent, "render", saved, "--layer", "nothing", "--format", "csv")
    assert ran.returncode == 2
    assert b"no layer has such a name" in ran.stderr


def test_failures_are_one_line(saved: Path) -> None:
    assert "no such choice; use one of table, json, sarif" in failed(emscan("render", saved, "--format", "pdf"))
    assert "cannot read" in failed(emscan("render", saved.parent / "gone.json"))
    assert "would replace what is audited" in failed(emscan("render", saved, "--output", saved))
    (saved.parent / "bad.json").write_text("{}\x1b[31m")
    assert "is no report" in failed(emscan("render", saved.parent / "bad.json"))


def test_a_note_of_unknown_fields(saved: Path) -> None:
    document = json.loads(saved.read_text())
    document["later\x1b[31m"] = 1
    saved.write_text(json.dumps(document))
    ran = here(saved.parent, "render", saved)
    assert ran.returncode == 0
    assert (
        ran.stderr.decode()
        == f"emscan: note: {saved}: ignored what this version of emscan does not know: later\\x1b[31m\n"
    )


def test_in_actions_the_table_stays_on_stdout_and_annotations_go_to_stderr(saved: Path) -> None:
    folder = saved.parent
    plain = here(folder, "render", saved)
    summary = folder / "summary.md"
    summary.write_text("before\n")
    ran = here(folder, "render", saved, GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(summary))
    assert ran.stdout == plain.stdout
    assert [one[0] for one in CHECKED["github"](ran.stderr.decode().rstrip("\n"))] == ["error", "warning", "notice"]
    assert summary.read_text().startswith("before\n### emscan: `runs/step 1/model.pt`\n")


def test_in_actions_a_format_that_is_asked_for_is_all_there_is(saved: Path) -> None:
    summary = saved.parent / "summary.md"
    actions = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary)}
    ran = here(saved.parent, "render", saved, "--format", "json", **actions)
    assert not ran.stderr
    assert not summary.exists()
    ran = here(saved.parent, "render", saved, "--format", "table", **actions)
    assert not ran.stderr
    ran = here(saved.parent, "render", saved, "--format", "github", **actions)
    CHECKED["github"](ran.stdout.decode().rstrip("\n"))
    assert not ran.stderr
    assert summary.read_text().startswith("### emscan: ")


def test_a_summary_that_cannot_be_written_is_a_note(saved: Path) -> None:
    ran = here(
        saved.parent, "render", saved, "--format", "github", GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY="/no/such/file"
    )
    assert ran.returncode == 0
    assert ran.stderr == b"emscan: note: no job summary: No such file or directory\n"


def test_a_summary_never_grows_beyond_its_limit(saved: Path) -> None:
    summary = saved.parent / "summary.md"
    summary.write_text("x" * ((1 << 20) - 500))
    here(saved.parent, "render", saved, GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(summary))
    assert (1 << 20) - 500 < summary.stat().st_size <= 1 << 20


def test_files_are_named_from_the_checkout(saved: Path) -> None:
    inner = saved.parent / "inner"
    inner.mkdir()
    (inner / "torch.py").write_text("")
    for variable in ("GITHUB_WORKSPACE", "CI_PROJECT_DIR"):
        ran = here(inner, "render", saved, "--format", "gitlab", **{variable: str(saved.parent)})
        paths = {issue["location"]["path"] for issue in json.loads(ran.stdout)}
        assert "inner/runs/step 1/model.pt" in paths


@pytest.mark.parametrize("name", sorted(CHECKED))
def test_audit_writes_every_format(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = emscan("audit", MODEL, "--probe", PROBE, "--format", name, "--output", out, "--fail-on", "warning", **OUTSIDE)
    assert ran.returncode == 1
    found = CHECKED[name](out.read_bytes().decode() if name == "csv" else out.read_text().rstrip("\n"))
    if name == "sarif":
        assert found["runs"][0]["invocations"][0]["exitCode"] == 1
        assert found["runs"][0]["automationDetails"]["id"] == "emscan/fixtures/relu_mlp.pt/"


def test_audit_anchors_at_the_users_own_line(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(4, 8)\n"
        "        nn.init.constant_(self.fc.bias[:2], -1e4)\n"
        "    def forward(self, x):\n"
        "        return torch.relu(self.fc(x))\n"
    )
    code = "import torch, net; torch.save(net.Net().state_dict(), 'net.pt')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    ran = subprocess.run(
        [sys.executable, "-m", "emscan", "audit", "net.pt", "--model", "net.py:Net", "--format", "sarif"],
        cwd=tmp_path, env={**os.environ, **OUTSIDE}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (run,) = CHECKED["sarif"](ran.stdout)["runs"]
    (dead,) = [r for r in run["results"] if r["ruleId"] == "EM101"]
    physical = dead["locations"][0]["physicalLocation"]
    assert (physical["artifactLocation"]["uri"], physical["region"]) == ("net.py", {"startLine": 9})

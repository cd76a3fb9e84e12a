"""The files for pre-commit, GitHub and GitLab: well formed, and their commands do what they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
RELU, PROBE = ROOT / "fixtures" / "relu_mlp.pt", ROOT / "fixtures" / "digits.safetensors"


def read(name: str) -> object:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_hook_takes_checkpoints_and_leaves_shards_and_optimizers() -> None:
    (hook,) = read(".pre-commit-hooks.yaml")
    assert {"id", "name", "entry", "language"} <= hook.keys()
    assert hook["entry"].split()[:2] == ["emscan", "check"]

    def taken(path: str) -> bool:
        return bool(re.search(hook["files"], path)) and not re.search(hook["exclude"], path)

    assert all(map(taken, ("m.pt", "run/epoch=3.ckpt", "model.safetensors", "a/my_optimizer_net.pt")))
    assert not any(map(taken, ("m.py", "model-00001-of-00002.safetensors", "run/optimizer.pt", "run/rng_state_0.pth")))


def test_the_action_is_a_composite_action() -> None:
    action = read("action.yml")
    assert {"name", "description", "inputs", "outputs", "runs"} <= action.keys()
    assert action["runs"]["using"] == "composite"
    steps = {step["name"]: step for step in action["runs"]["steps"]}
    for step in steps.values():
        assert ("run" in step) != ("uses" in step)
        assert "run" not in step or step["shell"] == "bash"
        # what a workflow passes in must not become part of a script
        assert "${{" not in step.get("run", "")
    named = set(re.findall(r"inputs\.(\w+)", (ROOT / "action.yml").read_text()))
    assert named == set(action["inputs"])
    assert all("description" in value for value in (*action["inputs"].values(), *action["outputs"].values()))


@pytest.mark.parametrize(("limit", "status"), [("0", 1), ("30%", 0)])
def test_the_steps_of_the_action_run(tmp_path: Path, limit: str, status: int) -> None:
    steps = {step.get("name"): step for step in read("action.yml")["runs"]["steps"]}
    (tmp_path / "a b.pt").write_bytes(RELU.read_bytes())
    output, summary = tmp_path / "output", tmp_path / "summary.md"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MODELS": "a b.pt\n",
        "CONFIG": "",
        "ARGS": f"--probe={PROBE}\n--max-dead={limit}\n",
        "REPORT": "r.json",
        "GITHUB_ACTIONS": "true",
        "GITHUB_OUTPUT": str(output),
        "GITHUB_STEP_SUMMARY": str(summary),
    }

    def step(name: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", steps[name]["run"]],
            cwd=tmp_path, env=environment | more, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    ran = step("Check")
    assert ran.returncode == 0, ran.stderr  # a later step fails the job, after the upload
    assert output.read_text() == f"status={status}\n"
    assert ("::error file=a b.pt,title=EM501" in ran.stderr) == (status == 1)
    assert "a b.pt" in summary.read_text()
    assert json.loads((tmp_path / "r.json").read_text())["model"]["path"] == "a b.pt"
    assert json.loads((tmp_path / "r.json.sarif").read_text())["version"] == "2.1.0"
    assert step("Status", STATUS=str(status)).returncode == status


def test_the_gitlab_job_names_files_that_its_command_writes() -> None:
    job = read("templates/gitlab-ci.yml")["emscan"]
    command = job["script"][-1]
    written = set(re.findall(r"--also \w+=(\S+)", command))
    reports = job["artifacts"]["reports"]
    assert {reports["codequality"], reports["junit"], *job["artifacts"]["paths"]} == written
    assert command.startswith('emscan check "$MODELS"')

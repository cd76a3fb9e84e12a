"""`emscan inspect` in a shell: what goes where, and the exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch
from torch import nn


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "emscan", *arguments],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "80", **environment},
    )  # fmt: skip


def test_a_table_and_status_0(saved):
    ran = run("inspect", saved(nn.Linear(2, 2)))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert " weight  float32  2 x 2  16 bytes" in ran.stdout
    assert "To audit it: emscan audit" in " ".join(ran.stdout.split("\n"))


def test_json_to_stdout_and_to_a_file(saved, tmp_path):
    path = saved({"w": torch.ones(2)})
    document = json.loads(run("inspect", path, "--format", "json", "--check-values").stdout)
    assert document["tensors"][0]["nan"] == 0
    out = tmp_path / "out.json"
    ran = run("inspect", path, "--format", "json", "--output", str(out))
    assert (ran.returncode, ran.stdout) == (0, "")
    assert json.loads(out.read_text())["tensors"][0]["nan"] is None


def test_one_line_and_status_2(tmp_path, written):
    for arguments, what in [
        ((str(tmp_path / "none.pt"),), "there is no such file; check the path"),
        ((written(b"\x89PNG", "a.pt"),), "it is a PNG image"),
        ((written(b"x", "b.pt"), "--format", "yaml"), "--format yaml: no such choice; use one of table, json"),
    ]:
        ran = run("inspect", *arguments)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert ran.stderr.count("\n") == 1
        assert what in ran.stderr


def test_what_is_recognized_and_not_supported_is_status_0(written):
    ran = run("inspect", written(b"GGUF" + bytes(40), "m.gguf"))
    assert ran.returncode == 0
    assert "not supported" in ran.stdout
    assert "Cannot be audited: it is a GGUF model" in ran.stdout


def test_the_output_never_replaces_what_is_inspected(saved):
    path = saved(nn.Linear(2, 2))
    ran = run("inspect", path, "--output", path)
    assert ran.returncode == 2
    assert "would replace" in ran.stderr


def test_the_schema_of_it():
    assert json.loads(run("schema", "inspect").stdout)["title"] == "emscan inspection"
    assert json.loads(run("schema").stdout)["title"] == "emscan report"
    assert run("schema", "other").returncode == 2

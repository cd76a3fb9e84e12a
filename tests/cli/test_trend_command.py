"""`emscan trend`: folders, order, checkpoints that fail, what goes where."""

from __future__ import annotations

import csv
import gc
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import emscan.cli.trend as command
from tests.cli.inprocess import Emscan, Ran, emscan
from tests.compare.runs import PROBE, oracle, revive, train
from tests.report.builder import gate, report

__all__ = ["emscan"]  # the fixture


def errors(ran: Ran) -> list[str]:
    """The lines of stderr that are no notes."""
    return [line for line in ran.err.splitlines() if "note:" not in line]


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, list[Path]]:
    return tmp_path, train(tmp_path / "lightning_logs" / "version_0" / "checkpoints", saves=3, every=8)


def test_a_lightning_folder(folder, emscan: Emscan) -> None:
    root, paths = folder
    ran = emscan("trend", root, "--probe", PROBE, COLUMNS="80")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith("4 checkpoints, ordered by step in the names\n")
    assert max(map(len, ran.out.splitlines())) <= 80
    found = json.loads(emscan("trend", root, "--probe", PROBE, "--format", "json").out)
    assert [one["step"] for one in found["checkpoints"]] == [0, 8, 16, 24]
    assert found["same_probe"]
    truth = [oracle(path) for path in paths]
    rows = {row["name"]: row for row in found["layers"]}
    assert rows["0"]["dead"] == [len(one["0"]["dead"]) for one in truth]
    steps = {(e["component"], e["after"], e["before"]) for e in rows["0"]["events"] if e["event"] == "died"}
    for after, before in ((0, 1), (1, 2), (2, 3)):
        new = set(truth[before]["0"]["dead"]) - set(truth[after]["0"]["dead"])
        assert {unit for unit, *where in steps if where == [after, before]} == new


def test_units_that_revive(tmp_path: Path, emscan: Emscan) -> None:
    *_, last = train(tmp_path / "run", saves=3, every=8)
    dead = oracle(last)["0"]["dead"]
    revive(last, tmp_path / "run" / "epoch=9-step=99.ckpt", dead[0])
    ran = emscan("trend", tmp_path / "run" / "*.ckpt", "--probe", PROBE)
    (line,) = [line for line in ran.out.splitlines() if "step 24 -> 99:" in line and f"revived {dead[0]}" in line]
    assert "died" not in line


def test_one_that_fails_is_reported_and_skipped(folder, emscan: Emscan) -> None:
    root, paths = folder
    paths[1].write_bytes(paths[1].read_bytes()[:500])
    ran = emscan("trend", root, "--probe", PROBE, "--format", "csv")
    assert ran.status == 2
    (line,) = errors(ran)
    assert f"cannot load {paths[1]}" in line
    rows = list(csv.DictReader(io.StringIO(ran.out)))
    assert [row["status"] for row in rows if not row["layer"]] == ["ok", "failed", "ok", "ok"]


def test_one_that_is_inconclusive_is_3(folder, tmp_path: Path, emscan: Emscan) -> None:
    root, _ = folder
    torch.save({"w": torch.ones(3, 3)}, tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "step=30.ckpt")
    ran = emscan("trend", root, "--probe", PROBE, "--format", "json")
    assert ran.status == 3
    assert json.loads(ran.out)["checkpoints"][-1]["status"] == "inconclusive"


def test_synthetic_probes_are_the_same_for_all(folder, emscan: Emscan) -> None:
    root, _ = folder
    ran = emscan("trend", root, "--format", "json", "--seed", "5")
    found = json.loads(ran.out)
    assert found["same_probe"]
    assert (found["probe"]["synthetic"], found["probe"]["seed"]) == (True, 5)
    assert "counts are indicative" in emscan("trend", root).out


def test_saved_reports_instead(tmp_path: Path, emscan: Emscan) -> None:
    for step, dead in ((9, [1]), (10, [1, 2])):
        made = report(gate(0, "a", dead=dead))
        (tmp_path / f"step-{step}.json").write_text(json.dumps(made.to_dict()))
    ran = emscan("trend", tmp_path, "--ascii")
    assert (ran.status, ran.err) == (0, "")
    assert "step 9 -> 10: died 2" in ran.out
    assert ran.out.isascii()


def test_one_model_at_a_time(folder, emscan: Emscan, monkeypatch) -> None:
    """The module of one checkpoint is gone before the next is loaded."""
    root, _ = folder
    alive: list[int] = []
    audit = command.Auditor.report

    def counted(self, path: str):
        alive.append(sum(type(one) is nn.Sequential for one in gc.get_objects()))
        return audit(self, path)

    monkeypatch.setattr(command.Auditor, "report", counted)
    assert emscan("trend", root, "--probe", PROBE).status == 0
    assert len(alive) == 4
    assert len(set(alive)) == 1


def test_interrupting_prints_what_was_audited(folder, emscan: Emscan, monkeypatch) -> None:
    root, _ = folder
    audit = command.Auditor.report
    done: list[str] = []

    def stops(self, path: str):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path)
        return audit(self, path)

    monkeypatch.setattr(command.Auditor, "report", stops)
    ran = emscan("trend", root, "--probe", PROBE, "--format", "json")
    assert ran.status == 130
    assert errors(ran) == ["emscan: interrupted: 2 of 4 checkpoints were audited"]
    assert len(json.loads(ran.out)["checkpoints"]) == 2


@pytest.mark.parametrize(("encoding", "drawn"), [("ascii", "_#"), ("utf-8", "▁█")])
def test_sparklines_are_what_the_terminal_can_show(tmp_path: Path, encoding: str, drawn: str) -> None:
    for step, dead in ((9, []), (10, [1, 2])):
        (tmp_path / f"step-{step}.json").write_text(json.dumps(report(gate(0, "a", dead=dead)).to_dict()))
    command = [sys.executable, "-m", "emscan", "trend", str(tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "TERM": "xterm"}
    ran = subprocess.run(command, capture_output=True, check=True, env=environment)
    assert f"dead  {drawn}  0 -> 2" in ran.stdout.decode(encoding)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone"], "gone: no such file or folder; give files, a pattern in quotes, or the folder of a run"),
        (["x", "--format", "html"], "--format html: no such choice; use one of table, json, csv"),
    ],
)
def test_what_is_wrong_is_one_line(emscan: Emscan, arguments: list[str], message: str) -> None:
    ran = emscan("trend", *arguments)
    assert (ran.status, ran.out) == (2, "")
    assert errors(ran) == [f"emscan: error: {message}"]

"""The README cannot drift: what it shows is what the commands print."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from emscan.rules import RULES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```\w*\n(.*?)```", README, re.DOTALL)
    assert found, name
    return found[1]


def emscan(*arguments: str, columns: int = 100) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": str(columns), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "emscan", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_the_first_run_prints_what_the_readme_shows() -> None:
    line = block("audit line").strip()
    command = line.partition(" && emscan ")[2]
    ran = emscan(*shlex.split(command))
    assert ran.returncode == 0
    assert ran.stdout == block("audit output")


def test_structure_without_weights_prints_what_the_readme_shows() -> None:
    pytest.importorskip("transformers")
    ran = emscan(*shlex.split(block("structure line").strip().removeprefix("emscan ")))
    assert ran.returncode == 0
    assert ran.stdout == block("structure output")


def test_the_seeds_table_is_literally_there() -> None:
    rows = re.findall(r"^ (Linear \+ .+?)  +(?:\S+ +)?(Yes|No) ", block("audit output"), re.MULTILINE)
    assert rows == [("Linear + ReLU", "No")] * 3 + [("Linear + Softmax + Cross-Entropy", "Yes")]


def test_the_install_lines_use_the_constraints() -> None:
    for name in ("audit line", "test line"):
        assert block(name).startswith("pip install -c constraints.txt ")
    assert "torch==" in (ROOT / "constraints.txt").read_text()


def test_every_option_of_the_readme_exists_and_the_other_way_round() -> None:
    usage = README[README.index("emscan audit MODEL") : README.index("emscan schema ")]
    shown = set(re.findall(r"--[a-z-]+", usage))
    offered = set(re.findall(r"(--[a-z-]+)", emscan("audit", "--help").stdout))
    assert shown <= offered
    assert offered - shown == {"--help", "--rare", "--dormant", "--starved", "--hard", "--saturated"}


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^emscan (rule|schema)", README, re.MULTILINE))))
def test_commands_run(command: str) -> None:
    ran = emscan(command)
    assert ran.returncode == 0
    assert ran.stdout
    assert not ran.stderr


def test_codes_in_the_readme_are_rules() -> None:
    assert set(re.findall(r"EM\d{3}", README)) <= set(RULES)

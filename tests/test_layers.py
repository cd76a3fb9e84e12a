"""Data walks through the house in one direction: no folder imports from a later one."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "emscan"
# Folder -> the folders of the package that it may import from.
MAY_IMPORT = {
    "shapeless": set(),
    "load": {"report.document", "usercode"},
    "probe": {"load", "report.document", "usercode"},
    "trace": set(),
    "classify": {"trace", "report.document"},
    "measure": {"trace", "classify", "report.document"},
    "report": set(),
    "rules": {"report"},
    "inspect": {"load", "report"},
    "policy": {"rules", "report"},
    "compare": {"policy", "rules", "report", "inspect"},
    "cli": {"load", "probe", "pipeline", "rules", "report", "inspect", "policy", "compare", "pruning", "usercode"},
}
COMMON = {"errors", "limits", "_version", "state", "shapeless"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_no_folder_imports_from_a_later_one(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | COMMON | {folder}
    files = list((PACKAGE / folder).rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            if not name.startswith("emscan."):
                continue
            inner = name.removeprefix("emscan.")
            allowed_here = any(inner == a or inner.startswith(f"{a}.") or a.startswith(f"{inner}.") for a in allowed)
            assert allowed_here, f"{path.relative_to(PACKAGE)} imports {name}"


def test_every_folder_of_the_package_is_in_the_table() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(MAY_IMPORT)


@pytest.mark.parametrize("folder", ["report", "rules", "inspect", "policy"])
def test_reports_rules_and_inspections_never_import_torch(folder: str) -> None:
    for path in (PACKAGE / folder).rglob("*.py"):
        assert not any(name == "torch" or name.startswith("torch.") for name in imports(path)), path


def test_importing_emscan_alone_does_not_import_torch() -> None:
    code = "import sys, emscan; emscan.__version__; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"

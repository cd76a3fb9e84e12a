"""Reports and the setting that the tests of formats use; running this file writes the snapshots anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from emscan import rules
from emscan.report.document import Evidence, Finding, Report
from emscan.report.formats import FORMATS, Page, Setting, Unaudited
from tests.report.builder import gate, plain, report, seed, softmax

ROOT = Path("/project")
SNAPSHOTS = Path(__file__).parent / "snapshots"
SETTING = Setting(folder=ROOT, rules=rules.pages(), exit_status=1)
UNAUDITED = (Unaudited("gone.pt", "no such file"), Unaudited("old.pt", "not in the policy", skipped=True))


def mixed() -> Report:
    """An error, warnings, a note, two suppressed findings; layers that run in the user's own files and in others'."""
    head = softmax(2, "head", count=8)
    head.evidence = Evidence("softmax", None, 0.5, 2e-7, 1e-5, "float32", True)
    rows = [
        gate(0, "body.0", dead=[1, 5]),
        gate(1, "body.2", dead=[3]),
        head,
        gate(3, "body.4", dead=[0]),
        plain(4, "fc"),
    ]
    rows[0].source = "/project/src/net.py:12"
    rows[1].source = "/usr/lib/python3/site-packages/timm/vit.py:7"
    head.source = "/project/.venv/lib/site-packages/x.py:3"
    made = report(*rows, synthetic=True)
    made.model.path = "runs/step 1/model.pt"
    held = [f for f in made.findings if f.layer == "body.2"]
    held[0].suppressed = "ignore: body.2"
    next(f for f in made.findings if f.layer == "body.4").suppressed = "baseline"
    return made


def many(count: int) -> Report:
    """A report of so many findings, every third of each level, the mildest first."""
    made = report(gate(0, "a"))
    levels = ("note", "warning", "error")
    made.findings = [
        Finding("EM101", levels[i * 3 // count], f"layer a: {i}", "a", 0, [i], f"v1:EM101:{i:016x}")
        for i in range(count)
    ]
    return made


PAGE = "What is wrong.\n\nWhat it finds: units\nof a gate.\n\nWhy it matters: [so](1).\n\nWhat to do: this."


def snapshot(name: str) -> str:
    """Return what a format makes of two reports; the words of rules, which are tested elsewhere, are replaced."""
    made = [mixed(), seed()]
    for finding in (finding for one in made for finding in one.findings):
        about = f"layer {finding.layer}: " if finding.layer is not None else ""
        finding.message, finding.help = f"{about}50% of what {finding.rule} finds", f"what {finding.rule} advises"
    pages = {code: Page(code, page.name, page.level, PAGE) for code, page in rules.pages().items()}
    setting = replace(SETTING, rules=pages)
    return FORMATS[name].render_many(made, setting=setting) + FORMATS[name].end


if __name__ == "__main__":
    SNAPSHOTS.mkdir(exist_ok=True)
    for one in FORMATS:
        if one not in {"table", "json"}:
            (SNAPSHOTS / f"{one}.txt").write_bytes(snapshot(one).encode())

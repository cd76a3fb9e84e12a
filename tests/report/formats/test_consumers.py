"""JUnit, GitHub, GitLab, Markdown, CSV: what each says of errors, warnings, notes, suppressed and unaudited."""

from __future__ import annotations

import dataclasses

import pytest

from emscan.report.document import Finding
from emscan.report.formats import FORMATS
from emscan.report.markdown import code, summary
from emscan.report.markdown import text as prose
from tests.report.builder import gate, report, seed
from tests.report.formats import validators
from tests.report.formats.samples import SETTING, UNAUDITED, many, mixed

WITH_FAILED = dataclasses.replace(SETTING, unaudited=UNAUDITED)


def rendered(name: str, *reports, setting=SETTING) -> str:
    return FORMATS[name].render_many(reports, setting=setting)


def outcomes(text: str) -> dict[str, str]:
    found = {}
    for case in validators.junit(text).iter("testcase"):
        tags = [child.tag for child in case if child.tag != "system-out"]
        found[case.get("name")] = tags[0] if tags else "passed"
    return found


def test_junit_tells_failed_skipped_passed_and_inconclusive_apart() -> None:
    assert outcomes(rendered("junit", mixed())) == {
        "head: EM401 evidence-fails": "failure",
        "body.0: EM101 dead-unit": "failure",
        "body.2: EM101 dead-unit": "skipped",
        "body.4: EM101 dead-unit": "skipped",
        "EM903 synthetic-probe": "passed",
        "fc: Linear": "passed",
    }
    blind = outcomes(rendered("junit", report(gate(0, "a"), unclassified=("x.y",))))
    assert blind["coverage"] == "error"
    assert blind["a: Linear + ReLU"] == "passed"


def test_junit_has_a_suite_for_every_model_and_for_what_failed() -> None:
    root = validators.junit(rendered("junit", seed(), seed(), setting=WITH_FAILED))
    assert [suite.get("name") for suite in root] == ["model.pt", "model.pt (2)", "gone.pt", "old.pt"]
    failed, skipped = root[2], root[3]
    assert failed.find("testcase/error").get("message") == "no such file"
    assert skipped.find("testcase/skipped").get("message") == "not in the policy"
    assert int(root.get("errors")) == 1


def test_github_annotations() -> None:
    found = validators.github(rendered("github", mixed(), setting=WITH_FAILED))
    assert [one[0] for one in found] == ["error", "error", "warning", "notice"]
    assert found[0][2] == "gone.pt: no such file"
    assert found[2][1] == {"file": "src/net.py", "line": "12", "title": "EM101 dead-unit"}
    assert found[1][1] == {"file": "runs/step 1/model.pt", "title": "EM401 evidence-fails"}


def test_github_escapes_what_the_runner_would_read() -> None:
    made = report(gate(0, "a"))
    made.model.path = "a,b:c%.pt"
    made.findings = [Finding("EM101", "error", "100% of a::error::x, %0A y", "a", 0)]
    text = rendered("github", made)
    assert text.startswith("::error file=a%2Cb%3Ac%25.pt,title=EM101 dead-unit::")
    ((_, properties, message),) = validators.github(text)
    assert properties["file"] == "a,b:c%.pt"
    assert message == "a,b:c%.pt: 100% of a::error::x, %0A y"


def test_github_shows_ten_of_a_level_and_counts_the_rest() -> None:
    found = validators.github(rendered("github", many(90)))
    assert [one[0] for one in found].count("error") == 10
    last = [one for one in found if one[0] == "error"][-1]
    assert last[2].startswith("21 more errors")
    exact = validators.github(rendered("github", many(30)))
    assert len(exact) == 30
    assert not any("more" in one[2] for one in exact)


def test_github_names_no_file_outside_the_checkout() -> None:
    made = report(gate(0, "a", dead=[1]))
    made.model.path = "/elsewhere/model.pt"
    ((_, properties, message),) = validators.github(rendered("github", made))
    assert "file" not in properties
    assert message.startswith("/elsewhere/model.pt: ")


def test_gitlab_leaves_out_what_is_suppressed() -> None:
    issues = validators.gitlab(rendered("gitlab", mixed(), setting=WITH_FAILED))
    assert [
        (i["check_name"], i["severity"], i["location"]["path"], i["location"]["lines"]["begin"]) for i in issues
    ] == [
        ("EM401", "critical", "runs/step 1/model.pt", 1),
        ("EM101", "major", "src/net.py", 12),
        ("EM903", "info", "runs/step 1/model.pt", 1),
        ("not-audited", "blocker", "gone.pt", 1),
    ]


def test_gitlab_fingerprints_do_not_move_with_the_numbers() -> None:
    before, after = (report(gate(0, "a", dead=dead), gate(1, "b", dead=[2])) for dead in ([1], [1, 2]))
    prints = [[i["fingerprint"] for i in validators.gitlab(rendered("gitlab", made))] for made in (before, after)]
    assert prints[0] == prints[1]
    other = seed()
    other.model.path = "other.pt"
    both = validators.gitlab(rendered("gitlab", seed(), other))
    assert len({i["fingerprint"] for i in both}) == 2 * len(seed().findings)


def test_markdown_shows_the_table_and_what_counts() -> None:
    text = rendered("markdown", mixed())
    found = validators.markdown(text)
    assert found["rows"][0][0] == "Layer"
    assert [row[1] for row in found["rows"][1:]] == ["body.0", "body.2", "head", "body.4"]
    assert all(len(row) == 8 for row in found["rows"])
    assert "1 by baseline, 1 by ignore" in text
    assert "layer `body.2`" not in text
    several = validators.markdown(rendered("markdown", mixed(), seed(), setting=WITH_FAILED))
    assert [row[0] for row in several["rows"][:3]] == ["Model", "runs/step 1/model.pt", "model.pt"]
    assert "Not audited" in " ".join(several["plain"])


@pytest.mark.parametrize("name", ["a|b", "`a`", "``", " a ", "a\\|b", "a`b``c", "<b>", "@team", "-", "\\", "|"])
def test_a_code_span_holds_any_name(name: str) -> None:
    found = validators.markdown(f"| x | y |\n| --- | --- |\n| {code(name)} | z |")
    assert found["rows"][1] == [name, "z"] or (name.strip() == "" and found["rows"][1][1] == "z")
    assert found["markup"] == [("code_inline", name)]


@pytest.mark.parametrize(
    "said",
    [
        "@team #12 !3",
        "https://evil.test www.evil.test",
        "<script>x</script>",
        "*a* _b_ ~~c~~ [d](e) ![f](g)",
        "a|b\\|c",
        "$x$",
    ],
)
def test_prose_stays_prose(said: str) -> None:
    found = validators.markdown(f"| x |\n| --- |\n| {prose(said)} |")
    assert found["rows"][1][0].replace("<!-- -->", "") == said
    assert {kind for kind, _ in found["markup"]} <= {"html_inline"}
    assert {content for _, content in found["markup"]} <= {"<!-- -->"}
    for bad in ("@team", "#12", "!3", "https://", "www.evil"):
        assert bad not in found["plain"][-1]  # the comment parts it


def test_a_summary_is_cut_after_a_line_and_says_so() -> None:
    long = "\n".join(f"- finding {i} ü" for i in range(200_000))
    cut = summary(long)
    assert len(cut.encode()) <= 1 << 20
    assert cut.endswith("(cut: a job summary holds 1 MiB)\n")
    assert cut.splitlines()[-4].startswith("- finding ") or cut.splitlines()[-3].startswith("- finding ")
    assert summary("short") == "short"
    assert summary(long, room=10) == ""
    assert summary("x", room=-5) == ""


def test_csv_has_a_row_per_component_with_its_numbers() -> None:
    made = seed()
    made.layers[0].components.stuck_at = [6.0, None]
    rows = validators.components(rendered("csv", made) + "\r\n")
    assert len(rows) == made.summary.components
    dead = [(r["layer"], r["component"], r["stuck_at"]) for r in rows if r["state"] == "dead"]
    assert dead == [("0", "1", "6.0"), ("0", "5", "")]
    assert {r["load"] for r in rows if r["kind"] == "classes"} == {"0.1"}
    assert {r["on_rate"] for r in rows if r["kind"] == "units"} == {"0.25"}


def test_csv_guards_formulas_and_lists_what_has_no_numbers() -> None:
    row = gate(0, '=cmd|"/c calc"!A1', count=8, dead=[3, 7], provably_dead=[7])
    row.components.on_rate, row.components.count = None, 10**12  # what a report claims is not what it holds
    row.module = "@SUM(1)"
    found = validators.components(rendered("csv", report(row)) + "\r\n")
    assert [(r["component"], r["state"]) for r in found] == [("3", "dead"), ("7", "dead provably_dead")]
    assert found[0]["layer"] == '\'=cmd|"/c calc"!A1'
    assert found[0]["module"] == "'@SUM(1)"


def test_thirty_thousand_findings_are_written_whole_where_nothing_limits_them() -> None:
    made = many(30_000)
    assert len(validators.gitlab(rendered("gitlab", made))) == 30_000
    assert len(list(validators.junit(rendered("junit", made)).iter("testcase"))) == 30_000
    assert "more finding" in rendered("markdown", made)

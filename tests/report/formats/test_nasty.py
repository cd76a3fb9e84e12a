"""Names and messages that nobody would choose: every format stays what its consumer accepts."""

from __future__ import annotations

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emscan.report.document import Finding, Report
from emscan.report.formats import FORMATS
from emscan.report.read import parse_reports
from tests.report.builder import gate, report, softmax
from tests.report.formats.samples import SETTING
from tests.report.formats.test_formats import CHECKED

CHOSEN = [
    "", " ", "a|b", '"', "'", "<b>&amp;</b>", "]]>", "-->", "::error::x", "##[error]x", "%0A%25", "=1+1", "+1", "-1", "@x",
    "a\nb", "a\r\nb", "\x00", "\x1b[31m", "\u202e", "\ufffe", "\ud800", "\udcff", "é", "名前", "😀", "`", "``x`", "\\", "{0}",
    "[a](b)", "a:b,c", "../../x", "C:\\x", "//x", "x" * 5_000, "|" * 300, "www.a.b", "https://a.b", "@team", "#1",
]  # fmt: skip
FINGERPRINT = "v1:EM101:0123456789abcdef"
TEXT = st.one_of(st.sampled_from(CHOSEN), st.text(st.characters(exclude_categories=()), max_size=30))


@st.composite
def reports(draw: st.DrawFn) -> Report:
    rows = [gate(i, draw(TEXT), dead=[1, 3]) for i in range(draw(st.integers(1, 3)))] + [softmax(3, draw(TEXT))]
    for row in rows:
        row.composition, row.module = draw(TEXT), draw(TEXT)
        row.source = draw(st.one_of(st.none(), TEXT, st.builds("{}:{}".format, TEXT, st.integers(0, 99))))
    made = report(*rows, synthetic=draw(st.booleans()), unclassified=tuple(draw(st.lists(TEXT, max_size=2))))
    made.model.path, made.model.format, made.probe.source = draw(TEXT), draw(TEXT), draw(TEXT)
    made.tool["version"] = draw(TEXT)
    level = st.sampled_from(["error", "warning", "note"])
    for _ in range(draw(st.integers(0, 3))):
        made.findings.append(
            Finding("EM101", draw(level), draw(TEXT), draw(TEXT), draw(st.integers(0, 5)), [1], FINGERPRINT, draw(TEXT))
        )
    for finding in made.findings:
        finding.suppressed = draw(st.one_of(st.none(), TEXT))
    return made


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(reports(), min_size=1, max_size=2))
def test_every_format_is_accepted(made: list[Report]) -> None:
    for name, check in CHECKED.items():
        text = FORMATS[name].render_many(made, setting=SETTING) + (FORMATS[name].end if name == "csv" else "")
        text.encode()  # what a file is written in
        assert not any(c not in "\n\r" and not c.isprintable() for c in text), name
        found = check(text)
        if name == "markdown":
            assert {kind for kind, content in found["markup"] if content != "<!-- -->"} <= {
                "code_inline",
                "strong_open",
            }
            assert {len(row) for row in found["rows"]} <= {8}
            assert set(found["blocks"]) <= BLOCKS
        if name == "junit":
            assert len(list(found)) == len(made)


BLOCKS = {
    "heading_open", "heading_close", "paragraph_open", "paragraph_close", "inline", "table_open", "table_close",
    "bullet_list_open", "bullet_list_close",
}  # fmt: skip


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(reports())
def test_a_saved_report_comes_back_as_it_was(made: Report) -> None:
    text = FORMATS["json"].render(made)
    (back,) = parse_reports(text.encode(), "x")
    assert back == made
    assert json.loads(FORMATS["json"].render(back)) == json.loads(text)

"""The page is one file, nothing in it runs or is fetched, and what comes from elsewhere stays text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from nni_plugins.report.findings import Candidate, Findings, Layer
from nni_plugins.report.html import html, spoken

Make = Callable[..., Findings]
EVIL = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'--><b>"


class Seen(HTMLParser):
    """The elements, attributes and words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.links.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_is_whole_and_well_formed(make_findings: Make) -> None:
    findings = make_findings(layers=[Layer("conv1", 16, 10), Layer("conv2", 32, 32)])
    page = html(findings, ["`best/`: the compact model"])
    seen = Seen(page)
    assert seen.open == []
    assert seen.tags["script"] == 0
    assert seen.handlers == []
    assert all(link.startswith("#") for link in seen.links)  # glyphs of the plots
    assert len(seen.ids) == len(set(seen.ids))
    assert not re.search(r"@import|url\((?!#)", page)
    assert seen.tags["svg"] == 3  # against MACs, layers, progress
    for needed in (
        "98.06%",
        "equals the masked model",
        "42 of 48 units",
        "torch",
        "nni-plugins run",
        "abcd1234",
    ):
        assert needed in seen.words
    assert "#222222" not in page  # ink is the page's own, which may be dark


def test_what_comes_from_elsewhere_stays_text(make_findings: Make) -> None:
    base = make_findings()
    evil = [
        replace(base.candidates[0], parameters={EVIL: EVIL}, note=EVIL, others={EVIL: 1.0}),
        Candidate(EVIL, 7, "FAILED", parameters={"a": EVIL}, note=EVIL),
        *base.candidates[1:],
    ]
    findings = replace(
        base,
        title=EVIL,
        candidates=evil,
        metric=EVIL,
        recipe=EVIL,
        notes=[f"a `{EVIL}` b"],
        layers=[Layer(EVIL, 4, 2)],
        blocks=[EVIL],
        environment={EVIL: EVIL},
        experiment={"id": EVIL},
        commands=[EVIL],
        search={"tuner": EVIL, "space": {EVIL: {"_type": EVIL, "_value": [EVIL]}}},
        bounds={EVIL: 0.5},
        stages={EVIL: 0.5, "b": 0.4},
    )
    seen = Seen(html(findings, [EVIL]))
    plain = Seen(html(base))
    assert seen.tags["script"] == seen.tags["img"] == seen.tags["b"] - plain.tags["b"] == 0
    assert seen.handlers == []
    assert seen.open == []
    assert seen.words.count("<script>alert(1)</script>") > 15


def test_backquotes_become_code_and_stay_escaped() -> None:
    assert str(spoken("a `b<c` d")) == "a <code>b&lt;c</code> d"
    assert str(spoken("one ` alone <i>")) == "one ` alone &lt;i&gt;"


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_a_search_that_is_not_over_says_so(make_findings: Make, state: str) -> None:
    findings = make_findings(state=state, trials_wanted=50, notes=["the test split was left unread, as asked"])
    findings = replace(
        findings,
        compact=replace(findings.compact, test=None),  # type: ignore[type-var]
        dense=replace(findings.dense, test=None),  # type: ignore[type-var]
    )
    words = Seen(html(findings)).words
    assert {"running": "still running", "stopped": "can be resumed"}[state] in words
    assert "(of 50 wanted)" in words
    assert "test accuracy" not in words


def test_trials_that_only_report_numbers_have_a_page(make_findings: Make) -> None:
    trials = [
        Candidate(
            f"t{n}", n, "SUCCEEDED", 0.1 * n, default=0.1 * n, curve=(0.0, 0.05 * n), others={"loss": 1.0 / (n + 1)}
        )
        for n in range(6)
    ]
    findings = make_findings(
        dense=None, compact=None, candidates=trials, chosen="t0", metric="default", higher_is_better=False,
        maximize=False, max_error=None, relative_error=None, stock=None, bounds={},
    )  # fmt: skip
    seen = Seen(html(findings))
    assert "there is no compact model" in seen.words
    assert "The best result is 0" in seen.words
    assert "loss" in seen.words
    assert "equals the masked" not in seen.words
    assert seen.tags["svg"] == 2  # curves and progress
    assert seen.words.index("t0 (chosen)") < seen.words.index("t5")


def test_many_trials_are_folded(make_findings: Make) -> None:
    words = Seen(html(make_findings(trials=30))).words
    assert "All 31 trials" in words
    assert "1 failed, 30 succeeded" in words
    assert "NaN | at step 3" in words

"""How much of the saving in MACs is one of time, and what happens to the metric on the way, in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from nni_plugins.report.findings import Findings
from nni_plugins.report.table import proof_lines

Make = Callable[..., Findings]


def _with(findings: Findings, macs: float, time: float) -> Findings:
    dense = replace(findings.dense, macs=1000, latency_ms=10.0)
    return replace(
        findings, dense=dense, compact=replace(findings.compact, macs=int(1000 * macs), latency_ms=10 * time)
    )


@pytest.mark.parametrize(
    ("macs", "time", "quotient"), [(0.5, 0.5, 1.0), (0.5, 0.75, 0.5), (0.25, 1.0, 0.0), (0.5, 1.2, -0.4)]
)
def test_the_quotient(make_findings: Make, macs: float, time: float, quotient: float) -> None:
    findings = _with(make_findings(), macs, time)
    assert findings.realised == pytest.approx(quotient)
    (line,) = [line for line in proof_lines(findings) if "saving in MACs" in line]
    if quotient > 0:
        assert f"{100 * quotient:.0f}% is a saving of time" in line
    else:
        assert "none of time here" in line


def test_there_is_none_without_times_or_savings(make_findings: Make) -> None:
    findings = _with(make_findings(), 0.5, 0.5)
    assert replace(findings, compact=replace(findings.compact, latency_ms=None)).realised is None
    assert _with(findings, 1.0, 0.9).realised is None


def test_steps_and_teacher(make_findings: Make) -> None:
    findings = make_findings(
        stages={"dense": 0.99, "compact": 0.98, "quantised": 0.97}, ablation={"with_teacher": 0.985, "alone": 0.98}
    )
    text = "\n".join(proof_lines(findings))
    assert "after each step: dense 99.00%, compact 98.00%, quantised 97.00%" in text
    assert "with the teacher 98.50%, without it 98.00%" in text


def test_the_multiple_that_was_chosen(make_findings: Make) -> None:
    tried = [
        {"round_to": 1, "macs": 0.5, "time": 0.8, "realised": 0.4, "note": ""},
        {"round_to": 8, "macs": 0.48, "time": 0.55, "realised": 0.865, "note": ""},
        {"round_to": 16, "macs": None, "time": None, "realised": None, "note": "out of reach"},
    ]
    findings = make_findings(round_to={"chosen": 8, "tried": tried})
    (line,) = [line for line in proof_lines(findings) if "round_to: auto" in line]
    assert line == (
        "`prune.round_to: auto` took 8; timed: 1 leaves 50% of the MACs and 80% of the time (0.40 of the saving is "
        "real); 8 leaves 48% of the MACs and 55% of the time (0.86 of the saving is real); 16 does not fit."
    )
    assert Findings.from_dict(findings.to_dict()).round_to == findings.round_to


def test_the_latency_that_was_asked_for(make_findings: Make) -> None:
    tried = [{"sparsity": 0.5, "time": 0.58}, {"sparsity": 0.57, "time": 0.507}]
    findings = make_findings(latency_budget={"asked": 0.5, **tried[1], "tried": tried})
    (line,) = [line for line in proof_lines(findings) if "target: latency" in line]
    assert "asked for 50% of the time" in line
    assert "the pruned one took 51% (models that were made for it: 2)" in line
    assert Findings.from_dict(findings.to_dict()).latency_budget == findings.latency_budget

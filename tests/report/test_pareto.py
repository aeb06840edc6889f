"""The plot is drawn, whatever the trials are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from nni_plugins.report.findings import Candidate, Findings
from nni_plugins.report.pareto import save_pareto

Make = Callable[..., Findings]

LONELY = [Candidate("t0", 0, "SUCCEEDED", 0.9, 1000, 0.9)]
BROKEN = [Candidate("t0", 0, "FAILED", note="no")]


@pytest.mark.parametrize(
    "changes", [{}, {"candidates": LONELY, "chosen": "t0"}, {"candidates": BROKEN}, {"bounds": {}}]
)
def test_plot_is_written_and_not_empty(tmp_path: Path, changes: dict, make_findings: Make) -> None:
    path = tmp_path / "pareto.png"
    save_pareto(make_findings(**changes), path)
    image = matplotlib.image.imread(path)
    assert image.shape[0] >= 600
    assert image.shape[1] >= 1000
    assert np.asarray(image)[..., :3].std() > 0.02


def test_one_useless_trial_does_not_squeeze_the_others(tmp_path: Path, make_findings: Make) -> None:
    findings = make_findings()
    useless = Candidate("useless", 99, "SUCCEEDED", 0.1, 300_000, 0.1)
    save_pareto(make_findings(candidates=[*findings.candidates, useless]), tmp_path / "a.png")
    save_pareto(findings, tmp_path / "b.png")
    pixels = [matplotlib.image.imread(tmp_path / name)[..., 2] for name in ("a.png", "b.png")]
    spread = [np.flatnonzero((image < 0.8).any(axis=1)).size for image in pixels]
    assert spread[0] > 0.5 * spread[1]


def test_the_front_counts_metric_macs_and_latency_within_the_bounds(make_findings: Make) -> None:
    def one(name, metric, macs, latency, feasible=True):
        return Candidate(name, 0, "SUCCEEDED", metric, macs, metric, feasible=feasible, latency_ms=latency)

    trials = [
        one("cheap", 0.80, 100, 1.0),
        one("good", 0.95, 300, 3.0),
        one("beaten", 0.79, 110, 1.1),
        one("as quick as cheap, but for noise", 0.80, 101, 0.99),
        one("quick", 0.80, 200, 0.5),
        one("over the bound", 0.99, 50, 0.1, feasible=False),
        Candidate("failed", 7, "FAILED"),
    ]
    findings = make_findings(candidates=trials)
    assert [item.id for item in findings.front()] == ["cheap", "quick", "good"]
    lower = make_findings(candidates=trials, higher_is_better=False)
    assert [item.id for item in lower.front()] == ["cheap", "beaten", "quick"]

"""The page holds everything that one needs to believe the result and to get it again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nni_plugins.report.findings import Findings
from nni_plugins.report.page import page, save_page

Make = Callable[..., Findings]


def test_page_is_self_contained(tmp_path: Path, make_findings: Make) -> None:
    findings = make_findings()
    save_page(findings, tmp_path / "report.md", files=["`best/`: the compact model"])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for needed in (
        "| test accuracy | 98.33% | 98.06% | -0.27 points |",
        "2.4e-07 of the output's size",
        "NNI's own ModelSpeedup with our replacers makes a model of the same shapes and outputs that differ by at most 1.9e-07",
        "![accuracy against MACs, all trials](pareto.png)",
        "nni-plugins run experiments/digits",
        "20 succeeded",
        "failed: NaN \\| at step 3",
        "| torch | 2.13.0 |",
        "abcd1234",
    ):
        assert needed in text
    assert text.count("(chosen)") == 2  # in the front, and among all trials


def test_trials_come_best_first_and_failed_ones_last(make_findings: Make) -> None:
    findings = make_findings()
    table = page(findings).split("## Trials")[1].split("## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert rows[0].startswith(f"| **{findings.chosen}** (chosen)")
    assert rows[-1].startswith("| bad")


def test_without_a_test_figure_the_page_does_not_invent_one(make_findings: Make) -> None:
    findings = make_findings()
    from dataclasses import replace

    text = page(replace(findings, compact=replace(findings.compact, test=None)))
    assert "goes from" not in text

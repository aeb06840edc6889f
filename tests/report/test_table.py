"""What the table and its sentences say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rich.console import Console

from nni_plugins.report.findings import Findings, ModelFigures, StockCheck
from nni_plugins.report.table import amount, comparison, markdown_table, proof_lines, quality, rich_table

Make = Callable[..., Findings]


def test_rows_name_both_models_and_the_change(make_findings: Make) -> None:
    findings = make_findings(
        dense=ModelFigures("dense", 2_000_000, 200_000, 2.0, 0.9861, 0.9833, 1024**2),
        compact=ModelFigures("compact", 500_000, 100_000, 1.0, 0.9840, 0.9806, 1024**2 // 4),
    )
    header, rows = comparison(findings)
    assert header == ["", "dense", "compact", "change"]
    assert rows[0] == ["test accuracy", "98.33%", "98.06%", "-0.27 points"]
    assert rows[2] == ["MACs", "2 M", "500 k", "25% (4.00x less)"]
    assert [row[0] for row in rows] == ["test accuracy", "validation accuracy", "MACs", "parameters", "latency", "file"]


def test_figures_that_were_not_measured_are_left_out(make_findings: Make) -> None:
    findings = make_findings(dense=ModelFigures("dense", 10, 10), compact=ModelFigures("compact", 5, 5))
    assert [row[0] for row in comparison(findings)[1]] == ["MACs", "parameters"]


def test_a_regression_metric_is_not_shown_in_per_cent() -> None:
    assert quality(0.01234, "mse") == "0.01234"
    assert quality(0.97, "accuracy") == "97.00%"
    assert quality(None, "accuracy") == "–"


@pytest.mark.parametrize(("value", "text"), [(7, "7"), (12_300, "12.3 k"), (41_300_000, "41.3 M"), (4.1e9, "4.1 G")])
def test_amounts_have_units(value: float, text: str) -> None:
    assert amount(value) == text


def test_proof_says_so_when_the_models_differ(make_findings: Make) -> None:
    assert "equals" in proof_lines(make_findings())[0]
    assert "DIFFERS FROM" in proof_lines(make_findings(relative_error=0.1))[0]
    assert "not compared: no replacer" in proof_lines(make_findings(stock=StockCheck(False, 0.0, "no replacer")))[1]
    assert "OTHER SHAPES" in proof_lines(make_findings(stock=StockCheck(False, 0.0)))[1]


def test_markdown_keeps_its_columns_whatever_the_cells_hold() -> None:
    lines = markdown_table(["a", "b"], [["x|y", "two\nlines"]]).splitlines()
    assert lines[2] == "| x\\|y | two lines |"
    assert lines[1] == "| --- | ---: |"


def test_table_prints_on_a_narrow_terminal(make_findings: Make) -> None:
    console = Console(width=60, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(rich_table(make_findings()))
    assert "test accuracy" in console.export_text()

"""Two searches side by side: what is comparable is compared, and what is not is refused or said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from nni_plugins.report.compare import compare, hypervolume
from nni_plugins.report.compare_page import draw_fronts, markdown, save_comparison
from nni_plugins.report.findings import Candidate, Findings, ModelFigures

Make = Callable[..., Findings]
RECIPE = {"seed": 0, "data": {"name": "digits", "limit": None}, "prune": {"pruner": "taylor", "sparsity": 0.5}}


def _pair(make_findings: Make) -> tuple[Findings, Findings]:
    first = make_findings(title="first", recipe=yaml.safe_dump(RECIPE))
    changed = {**RECIPE, "seed": 1, "prune": {"pruner": "magnitude", "sparsity": 0.5}, "rank": {"a": 1, "b": 2}}
    second = make_findings(
        12,
        title="second",
        recipe=yaml.safe_dump(changed),
        environment={"Python": "3.12.1", "torch": "2.13.0"},
        search={"tuner": "TPE", "space": {"prune.pruner": {"_type": "choice", "_value": ["magnitude"]}}},
    )
    return first, second


def test_models_side_by_side(make_findings: Make) -> None:
    found = compare(*_pair(make_findings))
    rows = {row[0]: row[1:] for row in found.rows}
    assert found.header == ["", "first", "second", "second against first"]
    assert rows["test accuracy"] == ["98.06%", "98.06%", "+0.00 points"]
    assert rows["parameters"] == ["90 k", "90 k", "the same"]
    assert rows["trials"] == ["21, 1 failed", "13, 1 failed", ""]
    assert rows["bounds"] == ["macs 0.5", "macs 0.5", ""]
    assert found.warnings == []


def test_what_was_done_differently_is_named_once(make_findings: Make) -> None:
    found = compare(*_pair(make_findings))
    differences = {(one.kind, one.name): (one.first, one.second) for one in found.differences}
    assert differences[("recipe", "seed")] == ("0", "1")
    assert differences[("chosen", "prune.pruner")] == ("taylor", "magnitude")  # searched: the winners' choices
    assert differences[("recipe", "rank.*")] == ("–", "2 fields of its own")
    assert differences[("version", "Python")] == ("3.11.7", "3.12.1")
    assert differences[("search", "tuner")] == ("–", "TPE")
    assert differences[("space", "prune.pruner")] == ("–", "choice ['magnitude']")
    assert len(differences) == 6
    same = compare(_pair(make_findings)[0], _pair(make_findings)[0])
    assert same.differences == []
    assert same.names == ("first (first)", "first (second)")


def test_another_metric_is_refused(make_findings: Make) -> None:
    first, second = _pair(make_findings)
    with pytest.raises(ValueError, match="one measures accuracy, the other mse"):
        compare(first, replace(second, metric="mse"))
    with pytest.raises(ValueError, match="better in one, less in the other"):
        compare(first, replace(second, higher_is_better=False))


def test_other_data_are_said_and_have_no_hypervolume(make_findings: Make) -> None:
    first, second = _pair(make_findings)
    other = yaml.safe_dump({**RECIPE, "data": {"name": "digits", "limit": 400}})
    found = compare(first, replace(second, recipe=other))
    assert any("other data (data.limit)" in warning for warning in found.warnings)
    assert found.hypervolume is None
    assert "hypervolume" not in {row[0] for row in found.rows}
    unknown = compare(first, replace(second, recipe=""))
    assert any("a recipe is missing" in warning for warning in unknown.warnings)


def test_other_machines_bounds_and_states_are_said(make_findings: Make) -> None:
    first, second = _pair(make_findings)
    second = replace(second, environment={"processor": "x"}, bounds={"macs": 0.25}, state="running")
    second = replace(second, compact=replace(second.compact, test=None))  # type: ignore[type-var]
    text = " ".join(compare(first, second).warnings)
    for words in ("different machines", "macs 0.5; macs 0.25", "not over (running, 13 trials)", "for one of them only"):
        assert words in text


def _front(*points: tuple[float, int], dense: int = 100, higher: bool = True) -> Findings:
    trials = [Candidate(f"t{n}", n, "SUCCEEDED", metric, macs) for n, (metric, macs) in enumerate(points)]
    model = ModelFigures("dense", dense, 1, validation=0.9)
    return Findings("x", "score", model, None, "t0", trials, higher_is_better=higher)


def test_the_hypervolume_is_that_of_the_hand() -> None:
    # rectangle: 100 MACs wide, from 0.5 (worst on a front) to 0.9; first: (0.5, 20), (0.7, 50); second: (0.9, 60)
    found = hypervolume(_front((0.5, 20), (0.7, 50), (0.4, 90)), _front((0.9, 60)))
    assert found is not None
    assert (found.macs, found.worst, found.best) == (100, 0.5, 0.9)
    assert found.first == pytest.approx(0.2 * 50 / (0.4 * 100))
    assert found.second == pytest.approx(0.4 * 40 / (0.4 * 100))
    less = hypervolume(_front((0.5, 20), (0.3, 50), higher=False), _front((0.1, 60), higher=False))
    assert less is not None
    assert less.first == pytest.approx(0.2 * 50 / (0.4 * 100))
    assert (less.worst, less.best) == (0.5, 0.1)
    assert hypervolume(_front((0.5, 20)), _front()) is None
    assert hypervolume(_front((0.5, 20)), _front((0.6, 30))) is None  # two single models are no fronts


def test_files_are_written_and_escaped(make_findings: Make, tmp_path: Path) -> None:
    first, second = _pair(make_findings)
    second = replace(second, title="<script>alert(1)</script>", environment={"<img src=x>": "<b>"})
    found = compare(first, second)
    save_comparison(found, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"compare.{end}" for end in ("html", "md", "json", "png", "pdf")
    }
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page
    data = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert data["hypervolume"]["first"] > 0
    assert len(data["models"]) == 2
    assert "| test accuracy | 98.06% | 98.06% |" in markdown(found)


def test_both_fronts_are_drawn_with_lines_of_their_own(make_findings: Make) -> None:
    figure = draw_fronts(compare(*_pair(make_findings)))
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"first", "second"}
    assert lines["first"].get_linestyle() != lines["second"].get_linestyle()
    assert lines["first"].get_marker() != lines["second"].get_marker()
    bare = make_findings(dense=None, compact=None, candidates=[Candidate("a", 0, "SUCCEEDED", 0.5)], chosen="a")
    assert draw_fronts(compare(bare, bare)) is None

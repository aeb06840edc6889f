"""The table of subnets, and the tuners that are driven on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.subnets.table import RESULTS, Table, hypervolume
from benchmarks.tabulated import DOUBLE, SINGLE, drive, interval, make, page, scalarised
from benchmarks.tabulated import RESULTS as COMPARED


@pytest.fixture(scope="module")
def table() -> Table:
    return Table()


@pytest.fixture(scope="module")
def surroundings(table: Table) -> Any:
    return table.environment(list(table.ratios()))


def test_the_table_is_whole_and_small(table: Table) -> None:
    assert table.accuracy.shape == (5,) * 6
    assert table.accuracy.size >= 4000
    assert RESULTS.stat().st_size < 500_000
    assert table.share[(0,) * 6] == 1.0
    assert 0.9 < table.accuracy[(0,) * 6] <= 1
    for axis in range(6):  # less kept is less computed
        assert (np.diff(table.share, axis=axis) < 0).all()
    report = table.report(dict.fromkeys(table.ratios(), 0.0))
    assert not report["feasible"]
    assert report["default"] == pytest.approx(report["accuracy"] - 10)


def test_costs_of_the_table_are_those_of_the_graph(table: Table, surroundings: Any) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        levels = rng.integers(5, size=6)
        parameters = {f"prune.groups.{g}": 1 - float(table.kept[i]) for g, i in zip(table.groups, levels, strict=True)}
        assert table.levels(parameters) == tuple(levels)
        load = surroundings.load([parameters[name] for name in surroundings.names])
        assert load * table.budget == pytest.approx(float(table.share[tuple(levels)]), abs=1e-6)


def test_a_global_ranking_meets_the_budget(table: Table) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        parameters = {
            key: float(np.exp(rng.normal(0, 0.5))) if "scales" in key else float(rng.normal(0, 0.3))
            for key in table.affine()
        }
        assert 0.3 < table.share[table.levels(parameters)] <= 0.5


def test_hypervolume_by_hand() -> None:
    assert hypervolume(np.array([[0.5, 0.5]])) == pytest.approx(0.25)
    assert hypervolume(np.array([[0.5, 0.5], [0.8, 0.75], [0.4, 0.9]])) == pytest.approx(0.5 * 0.25 + 0.8 * 0.25)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5), rel=1e-3)


@pytest.mark.parametrize("name", SINGLE)
def test_every_tuner_runs_and_repeats_itself(name: str, table: Table, surroundings: Any) -> None:
    asked = drive(make(name, 3, table, None, surroundings), table.report, 12)
    assert len(asked) == 12
    if name != "NNI Evolution":  # its mutations come from modules' generators
        assert drive(make(name, 3, table, None, surroundings), table.report, 12) == asked
    if "recipe" in name or name in ("AMCTuner", "LeGRTuner"):
        assert all(table.report(parameters)["feasible"] for parameters in asked)


@pytest.mark.parametrize("name", DOUBLE)
def test_two_objectives(name: str, table: Table, surroundings: Any) -> None:
    objectives = [{"name": "accuracy", "direction": "maximize"}, {"name": "share", "direction": "minimize"}]
    assert len(drive(make(name, 0, table, objectives, surroundings), scalarised(table), 8)) == 8


def test_the_page_holds_the_committed_results() -> None:
    root = Path(COMPARED).resolve().parents[2]
    found = json.loads(Path(COMPARED).read_text(encoding="utf-8"))
    assert found["seeds"] >= 20
    assert page(found) in (root / "docs" / "search-tuners.md").read_text(encoding="utf-8")
    best = {name: float(np.mean(one["best"])) for name, one in found["single"].items()}
    for ours in ("OptunaTuner TPE, recipe", "OptunaTuner NSGA-II, recipe", "OptunaTuner TPE"):
        assert best[ours] > max(best["NNI TPE"], best["NNI Random"], best["NNI Evolution"])
    area = {name: float(np.mean(one["hypervolume"])) for name, one in found["double"].items()}
    for ours in ("OptunaTuner TPE", "OptunaTuner NSGA-II"):
        assert area[ours] > max(area["NNI TPE"], area["NNI Random"], area["NNI Evolution"])
    assert all(value < 50 for name, value in found["cost"].items() if name != "OptunaTuner GP")

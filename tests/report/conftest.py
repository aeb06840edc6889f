"""Findings to draw: a search over a net whose quality falls with its size."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from nni_plugins.report.findings import Candidate, Findings, ModelFigures, StockCheck


def _make(trials: int = 20, **changes: Any) -> Findings:
    """A search of `trials` trials, one of which failed and one of which is over the budget."""
    numbers = random.Random(3)
    candidates = []
    for index in range(trials):
        macs = numbers.randint(200_000, 1_400_000)
        accuracy = 0.99 - 0.03 * (1 - macs / 1_400_000) ** 2 - 0.01 * numbers.random()
        parameters = {"prune.pruner": "taylor", "prune.groups.layer1": 0.25 + index / 100}
        feasible = macs <= 1_300_000
        default = accuracy - (0 if feasible else 1)
        candidates.append(Candidate(f"t{index}", index, "SUCCEEDED", accuracy, macs, default, parameters, "", feasible))
    candidates.append(Candidate("bad", trials, "FAILED", parameters={"prune.pruner": "taylor"}, note="NaN | at step 3"))
    chosen = max((one for one in candidates if one.default is not None), key=lambda one: one.default or 0.0)
    findings = Findings(
        title="digits",
        metric="accuracy",
        dense=ModelFigures("dense", 2_600_000, 270_000, 1.9, 0.9861, 0.9833, 1_100_000),
        compact=ModelFigures("compact", chosen.macs or 0, 90_000, 1.1, chosen.metric, 0.9806, 380_000),
        chosen=chosen.id,
        candidates=candidates,
        max_error=3.1e-6,
        relative_error=2.4e-7,
        stock=StockCheck(True, 1.9e-7),
        bounds={"macs": 0.5},
        seconds=312.0,
        environment={"Python": "3.11.7", "torch": "2.13.0"},
        commands=["nni-plugins run experiments/digits"],
        recipe="seed: 0\n",
        experiment={"id": "abcd1234"},
    )
    return replace(findings, **changes)


@pytest.fixture
def make_findings() -> Callable[..., Findings]:
    """The findings of a search, with some of them changed by keyword."""
    return _make

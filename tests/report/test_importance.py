"""Importance is told where there is some, and otherwise why it cannot be told."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from nni_plugins.report.findings import Candidate, Importance
from nni_plugins.report.importance import flat, importance_of


def _trials(count: int, result: Callable[..., float], seed: int = 0, **more: object) -> list[Candidate]:
    numbers = random.Random(seed)
    found = []
    for index in range(count):
        values = {
            "share": numbers.random(),
            "rate": 10 ** numbers.uniform(-4, -1),
            "kind": numbers.choice(["a", "b", "c"]),
            "idle": numbers.random(),
        }
        metric = result(numbers=numbers, **values)
        found.append(Candidate(f"t{index}", index, "SUCCEEDED", metric, parameters={**values, **more}))
    return found


def _importance(trials: list[Candidate]) -> Importance:
    return importance_of("accuracy", trials, {one.id: one.metric for one in trials})


def test_what_decides_comes_first() -> None:
    found = _importance(
        _trials(40, lambda share, kind, numbers, **_: 3 * share + (kind == "a") + 0.05 * numbers.gauss(0, 1))
    )
    assert found.note == ""
    assert list(found.shares)[:2] == ["share", "kind"]
    assert found.shares["share"] > 0.4
    assert found.shares["idle"] < 0.1
    assert (found.explained or 0.0) > 0.5
    assert all(value >= 0 for value in found.spread.values())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_noise_has_no_order(seed: int) -> None:
    found = _importance(_trials(24, lambda numbers, **_: numbers.gauss(0, 1), seed))
    assert found.shares == {}
    assert "noise" in found.note


def test_too_few_trials_are_too_few() -> None:
    found = _importance(_trials(11, lambda share, **_: share))
    assert found.shares == {}
    assert found.note.startswith("11 trials with a result, of 4 parameters: too few")


def test_nothing_that_moves_and_nothing_that_comes_of_it() -> None:
    assert "same in all trials" in _importance(_trials(20, lambda **_: 0.5)).note
    still = [Candidate(f"t{n}", n, "SUCCEEDED", n / 20, parameters={"a": 1}) for n in range(20)]
    assert "no parameter has more than one value" in _importance(still).note
    assert "no parameter" in importance_of("accuracy", [], {}).note


def test_parameters_of_some_trials_are_named_and_left_out() -> None:
    trials = _trials(20, lambda share, **_: share)
    trials[3].parameters["extra"] = 1.0
    found = _importance(trials)
    assert found.left_out == ["extra"]
    assert "extra" not in found.shares
    assert found.shares


def test_odd_values_are_levels_of_their_own() -> None:
    trials = _trials(16, lambda share, **_: share)
    for index, one in enumerate(trials):
        one.parameters["odd"] = [None, True, [1, 2], {"a": 1}][index % 4]
    assert set(_importance(trials).shares) >= {"share", "odd"}


def test_nested_choices_are_flattened() -> None:
    assert flat({"a": {"_name": "x", "b": 1, "c": {"_name": "y"}}, "d": 2}) == {"a": "x", "b": 1, "c": "y", "d": 2}

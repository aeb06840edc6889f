"""LeGR's evolution: the identity first, better than its mutations at the end, one state after a resume."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from nni_plugins.search.errors import SearchError
from nni_plugins.search.legr import LeGRClassArgsValidator, LeGRTuner

GROUPS = ["conv1", "layer1", "layer2", "layer3"]
SPACE: dict[str, Any] = {
    **{f"prune.scales.{name}": {"_type": "loguniform", "_value": [0.1, 10]} for name in GROUPS},
    **{f"prune.shifts.{name}": {"_type": "uniform", "_value": [-1, 1]} for name in GROUPS},
}


def score(parameters: dict[str, Any]) -> float:
    scales = [math.log(parameters[f"prune.scales.{name}"]) - 0.4 * i for i, name in enumerate(GROUPS)]
    shifts = [parameters[f"prune.shifts.{name}"] + 0.2 * i for i, name in enumerate(GROUPS)]
    return -sum(x * x for x in (*scales, *shifts))


def run(one: LeGRTuner, trials: int, start: int = 0, sign: int = 1) -> list[float]:
    found = []
    for number in range(start, start + trials):
        parameters = one.generate_parameters(number)
        found.append(score(parameters))
        one.receive_trial_result(number, parameters, {"default": sign * found[-1]}, trial_job_id=f"t{number}")
    return found


def tuner(**arguments: Any) -> LeGRTuner:
    one = LeGRTuner(**{"seed": 0, **arguments})
    one.update_search_space(SPACE)
    return one


def test_the_first_trial_is_the_identity() -> None:
    first = tuner().generate_parameters(0)
    assert all(first[f"prune.scales.{name}"] == pytest.approx(1) for name in GROUPS)
    assert all(first[f"prune.shifts.{name}"] == pytest.approx(0) for name in GROUPS)


@pytest.mark.parametrize("mode", ["maximize", "minimize"])
def test_evolution_finds_what_mutations_of_the_identity_do_not(mode: str) -> None:
    found = run(tuner(optimize_mode=mode), 400, sign=1 if mode == "maximize" else -1)
    assert max(found) > -0.1 > max(found[:64])
    assert len(set(found)) == 400


def test_the_oldest_parent_goes() -> None:
    one = tuner(population_size=5, tournament_size=5)
    run(one, 9)
    assert [round(value, 9) for _, value in one.population] == [
        round(record.value["default"], 9) for record in one.journal.done()[-5:]
    ]


def test_failed_out_of_order_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.setenv("NNI_CHECKPOINT_DIRECTORY", str(tmp_path / "checkpoint"))
    one = tuner(population_size=6)
    asked = one.generate_multiple_parameters(list(range(8)))
    one.trial_end(2, False)
    for number in (7, 1, 0, 3):
        one.receive_trial_result(number, asked[number], score(asked[number]), trial_job_id=f"t{number}")
    one.receive_trial_result(4, asked[4], {"accuracy": 1})
    two = tuner(population_size=6)
    two.import_data([{"parameter": asked[7], "value": score(asked[7]), "trialJobId": "t7"}])
    two.import_data([{"parameter": asked[5], "value": score(asked[5])}])
    one.receive_trial_result(5, asked[5], score(asked[5]))
    assert list(two.population) == list(one.population)
    assert len(two.population) == 5
    assert two.generate_parameters(0) == one.generate_parameters(8)


def test_a_suggestion_after_a_thousand_trials_takes_less_than_50_ms() -> None:
    one = tuner()
    run(one, 1000)
    start = time.process_time()
    run(one, 20, 1000)
    assert (time.process_time() - start) / 20 < 0.05


def test_grids_are_kept_to() -> None:
    one = LeGRTuner(seed=0)
    one.update_search_space({"prune.scales.a": {"_type": "choice", "_value": [0.5, 1, 2]}, "prune.shifts.a": {"_type": "quniform", "_value": [-1, 1, 0.5]}})  # fmt: skip
    asked = one.generate_multiple_parameters(list(range(15)))
    assert asked[0] == {"prune.scales.a": 1, "prune.shifts.a": 0.0}
    assert {p["prune.scales.a"] for p in asked} <= {0.5, 1, 2}
    assert {p["prune.shifts.a"] for p in asked} <= {-1.0, -0.5, 0.0, 0.5, 1.0}


@pytest.mark.parametrize(
    ("arguments", "space", "words"),
    [
        ({"population_size": 0}, None, "population_size"),
        ({"tournament_size": 1.5}, None, "whole number"),
        ({"mutation": 2}, None, "mutation"),
        ({"optimize_mode": "up"}, None, "optimize_mode"),
        ({"population": 3}, None, "population is not"),
        ({}, {"prune.sparsity": {"_type": "uniform", "_value": [0, 1]}}, "prune.sparsity"),
        ({}, {"prune.scales.a": {"_type": "choice", "_value": ["x", "y"]}}, "range"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(arguments: Any, space: Any, words: str) -> None:
    def use() -> None:
        LeGRClassArgsValidator().validate_class_args(**arguments)
        LeGRTuner(**arguments).update_search_space(space)

    with pytest.raises(SearchError, match=words) as caught:
        use()
    assert "\n" not in str(caught.value)

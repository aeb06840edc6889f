"""Suggestions brought to a budget before a trial starts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from nni_plugins.search.budget import Projection
from nni_plugins.search.errors import SearchError
from nni_plugins.search.optuna_space import Space
from nni_plugins.search.optuna_tuner import OptunaClassArgsValidator, OptunaTuner

NAMES = [f"prune.groups.g{i}" for i in range(4)]


class Toy:
    """Four groups whose costs are 1, 2, 3 and 4 tenths."""

    names = NAMES
    features = np.eye(4)
    rest = np.array([0.9, 0.7, 0.4, 0.0])
    budget = 0.5

    def load(self, sparsities: Sequence[float]) -> float:
        return float(np.dot(1 - np.array(sparsities), [0.1, 0.2, 0.3, 0.4])) / self.budget

    def saved(self, sparsities: Sequence[float]) -> float:
        return float(np.dot(sparsities, [0.1, 0.2, 0.3, 0.4]))


def space(spec: dict[str, Any]) -> dict[str, Any]:
    return {**dict.fromkeys(NAMES, spec), "lr": {"_type": "loguniform", "_value": [0.01, 1]}}


def load(parameters: dict[str, Any]) -> float:
    return Toy().load([parameters[name] for name in NAMES])


@pytest.mark.parametrize("fill", [True, False])
def test_ranges_are_brought_to_the_budget(fill: bool) -> None:
    project = Projection(Toy(), Space(space({"_type": "uniform", "_value": [0.0, 0.9]})).parameters, fill)
    rng = random.Random(0)
    for _ in range(50):
        given = {**{name: rng.uniform(0, 0.9) for name in NAMES}, "lr": 0.1}
        found = project(given)
        assert found["lr"] == 0.1
        assert load(found) <= 1 + 1e-9
        if load(given) > 1 or fill:
            assert load(found) > 0.99
            one = [(0.9 - found[name]) / (0.9 - given[name]) for name in NAMES if found[name] > 1e-6]
            assert max(one) == pytest.approx(min(one))  # together
        else:
            assert found == given


def test_a_grid_is_kept_to_and_no_single_step_more_fits() -> None:
    parameters = Space(space({"_type": "quniform", "_value": [0.0, 0.8, 0.2]})).parameters
    project, rng = Projection(Toy(), parameters, True), random.Random(0)
    for _ in range(50):
        found = project({**{name: rng.randrange(5) * 0.2 for name in NAMES}, "lr": 1})
        assert load(found) <= 1 + 1e-9
        for name in NAMES:
            assert found[name] / 0.2 == pytest.approx(round(found[name] / 0.2))
            assert found[name] == 0 or load({**found, name: found[name] - 0.2}) > 1


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_every_suggestion_of_the_tuner_meets_it_and_is_learnt_as_it_was_tried(sampler: str) -> None:
    one = OptunaTuner(sampler, seed=0, environment=Toy(), n_startup_trials=4)
    one.update_search_space(space({"_type": "quniform", "_value": [0.0, 0.8, 0.1]}))
    for number in range(25):
        parameters = one.generate_parameters(number)
        assert load(parameters) <= 1 + 1e-9
        one.receive_trial_result(number, parameters, sum(parameters.values()))
    assert one.space is not None
    complete = [t for t in one._study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
    told = [one.space.inner(record.parameters) for record in one.journal.done()]
    assert sorted(map(repr, told)) == sorted(repr({name: t.params[name] for name in told[0]}) for t in complete)
    assert not [t for t in one._study.get_trials(deepcopy=False) if t.state.name == "RUNNING"]


def test_the_budget_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = {
        "model": {"name": "resnet8"},
        "prune": {"target": "channels", "sparsity": 0.4},
        "objective": {"macs": 0.5},
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    groups = {
        f"prune.groups.{name}": {"_type": "uniform", "_value": [0, 0.8]} for name in ("layer1", "layer2", "layer3")
    }
    one = OptunaTuner(recipe="recipe.yml", seed=0)
    one.update_search_space({**groups, "finetune.learning_rate": {"_type": "uniform", "_value": [0.01, 0.1]}})
    assert one._project is not None
    for number in range(5):
        parameters = one.generate_parameters(number)
        assert 0.9 < one._project.environment.load([parameters[n] for n in one._project.environment.names]) <= 1
    with pytest.raises(SearchError, match=r"no prune\.groups"):
        OptunaTuner(recipe="recipe.yml").update_search_space({"finetune.learning_rate": groups["prune.groups.layer1"]})
    with pytest.raises(SearchError, match="cannot be read"):
        OptunaTuner(recipe="recip.yml").update_search_space(groups)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"budget": {"macs": 0.5}}, "recipe too"),
        ({"recipe": 3}, "name of a file"),
        ({"recipe": "r.yml", "budget": {"flops": 1}}, "flops"),
        ({"recipe": "r.yml", "budget": {"macs": "half"}}, "budget.macs"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(SearchError, match=words):
        OptunaClassArgsValidator().validate_class_args(**arguments)


def test_a_budget_out_of_reach_is_said() -> None:
    one = OptunaTuner(seed=0, environment=Toy())
    with pytest.raises(SearchError, match="out of reach"):
        one.update_search_space(space({"_type": "uniform", "_value": [0.0, 0.3]}))

"""AMC: the budget is always met, the policy learns, an episode is its parameters, nothing is lost on resume."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from nni_plugins.search.amc import NETWORKS, AMCClassArgsValidator, AMCTuner
from nni_plugins.search.amc_state import GraphEnvironment
from nni_plugins.search.ddpg import DDPG, Episode
from nni_plugins.search.errors import SearchError

NAMES = [f"prune.groups.g{i}" for i in range(5)]
SPACE = {name: {"_type": "uniform", "_value": [0.0, 0.8]} for name in NAMES}
RECIPE: dict[str, Any] = {
    "model": {"name": "resnet8"},
    "prune": {"target": "channels", "sparsity": 0.3},
    "objective": {"macs": 0.5},
}
GROUPS = ("layer1", "layer2.0.conv1", "layer2.0.conv2", "layer3")


class Toy:
    """Five groups of equal cost; the first two should stay, the others go."""

    names = NAMES
    features = np.eye(5)
    rest = np.linspace(0.8, 0, 5)
    calls = 0

    def __init__(self, budget: float = 0.5) -> None:
        self.budget = budget

    def load(self, sparsities: Sequence[float]) -> float:
        return float(np.mean(1 - np.array(sparsities))) / self.budget

    def saved(self, sparsities: Sequence[float]) -> float:
        return float(np.mean(sparsities))


def reward(parameters: dict[str, float]) -> float:
    return 0.9 - 0.5 * float(
        np.mean([(parameters[name] - (0.1, 0.2, 0.75, 0.7, 0.75)[i]) ** 2 for i, name in enumerate(NAMES)])
    )


def run(one: AMCTuner, trials: int, start: int = 0) -> list[float]:
    found = []
    for number in range(start, start + trials):
        parameters = one.generate_parameters(number)
        assert one.environment is not None
        assert one.environment.load([parameters[name] for name in one.environment.names]) <= 1 + 1e-6
        found.append(reward(parameters))
        one.receive_trial_result(number, parameters, {"default": found[-1]}, trial_job_id=f"t{number}")
    return found


def tuner(space: dict[str, Any] | None = None, budget: float = 0.5, **arguments: Any) -> AMCTuner:
    one = AMCTuner(**{"seed": 0, "environment": Toy(budget), "warmup": 20, **arguments})
    one.update_search_space(space or SPACE)
    return one


def test_the_policy_learns_what_random_episodes_do_not_find() -> None:
    found = run(tuner(warmup=20), 50)
    assert np.mean(found[-10:]) > np.mean(found[:20]) + 0.02
    assert max(found[20:]) > max(found[:20])


@pytest.mark.parametrize("budget", [0.25, 0.9])
@pytest.mark.parametrize(
    "spec",
    [
        {"_type": "quniform", "_value": [0.0, 0.8, 0.2]},
        {"_type": "choice", "_value": [0.8, 0, 0.3]},
        {"_type": "uniform", "_value": [0.1, 0.9]},
    ],
)
def test_every_suggestion_meets_the_budget_and_lies_in_the_space(budget: float, spec: dict[str, Any]) -> None:
    one = tuner(dict.fromkeys(NAMES, spec), budget, warmup=5, noise=2.0)
    run(one, 10)
    for record in one.journal.records:
        for value in record.parameters.values():
            if spec["_type"] == "choice":
                assert value in spec["_value"]
                assert type(value) is type(spec["_value"][spec["_value"].index(value)])
            else:
                assert spec["_value"][0] <= value <= spec["_value"][1]
            if spec["_type"] == "quniform":
                assert value / 0.2 == pytest.approx(round(value / 0.2))


def test_episodes_in_flight_out_of_order_and_failed() -> None:
    one = tuner(warmup=4)
    asked = one.generate_multiple_parameters(list(range(8)))
    one.trial_end(3, False)
    for number in (7, 0, 5, 2, 6):
        one.receive_trial_result(number, asked[number], reward(asked[number]))
    one.receive_trial_result(1, asked[1], {"accuracy": 0.5})  # no default: no episode, and nothing is raised
    assert [round(episode.reward, 9) for episode in one.memory] == [round(reward(asked[n]), 9) for n in (7, 0, 5, 2, 6)]
    for episode, number in zip(one.memory, (7, 0, 5, 2, 6), strict=True):
        sparsities = [asked[number][name] for name in NAMES]
        assert episode.actions == pytest.approx([1 - s / 0.8 for s in sparsities])
        assert episode.states[2][:5] == pytest.approx(Toy.features[2])
        assert episode.states[2][5] == pytest.approx(sum(sparsities[:2]) / 5)  # MACs saved
        assert episode.states[2][7] == pytest.approx(episode.actions[1])


def test_killed_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.setenv("NNI_CHECKPOINT_DIRECTORY", str(tmp_path / "checkpoint"))
    one = tuner(warmup=5)
    run(one, 12)
    cut_off = one.generate_parameters(12)
    two = tuner(warmup=5)
    finished = [{"parameter": r.parameters, "value": r.value, "trialJobId": r.job} for r in one.journal.done()]
    two.import_data(finished)
    assert len(two.memory) == 12
    for mine, theirs in zip(one.memory, two.memory, strict=True):
        assert np.array_equal(mine.states, theirs.states)
        assert mine.reward == theirs.reward
    assert one._agent is not None
    assert two._agent is not None
    ours, theirs = one._agent._tensors(), two._agent._tensors()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert one._agent.baseline == two._agent.baseline
    assert float(ours["critic.adam.0.weight.step"]) > 0
    # both learn the same from what comes next
    two.import_data([{"parameter": cut_off, "value": 0.5}])
    one.receive_trial_result(12, cut_off, 0.5)
    assert one.generate_parameters(13) == two.generate_parameters(0)
    (tmp_path / "checkpoint" / NETWORKS).write_bytes(b"cut off")
    assert len(tuner(warmup=5).memory) == 13  # networks anew, episodes whole


@pytest.mark.alone
def test_suggestion_and_update_after_a_thousand_trials_take_less_than_50_ms() -> None:
    one = tuner(warmup=1100, memory=1000)
    run(one, 1000)
    one.warmup = 10
    run(one, 2, 1000)
    start = time.process_time()
    run(one, 10, 1002)
    assert (time.process_time() - start) / 10 < 0.05


def write(folder: Path, **changes: Any) -> Path:
    recipe = {key: {**RECIPE.get(key, {}), **changes.get(key, {})} for key in {*RECIPE, *changes}}
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder / "recipe.yml"


def test_states_and_costs_of_a_recipe(tmp_path: Path) -> None:
    names = [f"prune.groups.{name}" for name in reversed(GROUPS)]
    environment = GraphEnvironment.from_recipe(write(tmp_path), names, None)
    assert environment.names == names[::-1]  # in the order of the network
    assert environment.features.shape == (4, 7)
    assert environment.features.min() == 0.0
    assert environment.features.max() == 1.0
    assert list(environment.rest) == sorted(environment.rest, reverse=True)
    none, most = environment.load([0, 0, 0, 0]), environment.load([0.8] * 4)
    assert 1 < none < 2  # the stem's group loses 0.3 by the recipe
    assert most < 0.3
    # what the tuner counts is what the trial's plan costs
    from nni_plugins.channels import ChannelGraph
    from nni_plugins.training.allocate import config_list, producers
    from nni_plugins.training.data import build_data
    from nni_plugins.training.models import build_model
    from nni_plugins.training.recipe import load_recipe

    values = {f"prune.groups.{name}": s for name, s in zip(GROUPS, (0.4, 0.7, 0.25, 0.6), strict=True)}
    recipe = load_recipe(tmp_path / "recipe.yml").with_values(values)
    data = build_data(recipe)
    model = build_model(recipe, data.shape, data.classes, 0)
    graph = ChannelGraph.watch(model, data.example)
    entries, _ = config_list(recipe.prune, model, graph)
    kept = {
        group.name: round(group.size * (1 - entry["sparse_ratio"]))
        for entry in entries
        for group in graph.groups
        if group.prunable and entry["op_names"] == producers(group)
    }
    macs = graph.cost(kept).macs / graph.cost().macs
    assert environment.load([values[name] for name in environment.names]) == pytest.approx(macs / 0.5)
    assert environment.saved([values[name] for name in environment.names]) == pytest.approx(1 - macs)


def test_the_recipe_is_found_from_the_arguments_of_nnis_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import base64
    import json

    write(tmp_path)
    given = base64.b64encode(json.dumps({"trialCodeDirectory": str(tmp_path), "maxTrialNumber": 60}).encode()).decode()
    monkeypatch.setattr("sys.argv", ["nni", "--exp_params", given])
    one = AMCTuner(recipe="recipe.yml", seed=0)
    assert one.warmup == 15
    one.update_search_space({f"prune.groups.{name}": {"_type": "uniform", "_value": [0, 0.8]} for name in GROUPS})
    assert one.environment is not None
    for number in range(3):
        parameters = one.generate_parameters(number)
        assert 0.9 < one.environment.load([parameters[name] for name in one.environment.names]) <= 1


def test_ddpg_learns_a_target() -> None:
    rng, agent = np.random.default_rng(0), DDPG(3, 0)
    memory = []
    for _ in range(300):
        actions = rng.random(2)
        states = np.stack([[1, 0, 1], [0, 1, actions[0]]])
        memory.append(Episode(states, actions, -float((actions[0] - 0.8) ** 2 + (actions[1] - 0.3) ** 2)))
    before = agent.act(np.array([1.0, 0, 1]))
    agent.learn(memory, 150, rng)
    first = agent.act(np.array([1.0, 0, 1]))
    second = agent.act(np.array([0, 1.0, first]))
    assert abs(before - 0.5) < 0.01
    assert first > 0.6
    assert second < 0.45


@pytest.mark.parametrize(
    ("changes", "space", "words"),
    [
        (
            {"objective": {"macs": 0.1}},
            {"prune.groups.layer1": {"_type": "uniform", "_value": [0, 0.5]}},
            "out of reach",
        ),
        ({}, {"prune.sparsity": {"_type": "uniform", "_value": [0, 0.5]}}, "prune.sparsity"),
        ({}, {"prune.groups.layer1": {"_type": "normal", "_value": [0, 0.5]}}, "normal"),
        ({}, {"prune.groups.layer1": {"_type": "uniform", "_value": [0, 1]}}, "no sparsities"),
        ({}, {"prune.groups.layr1": {"_type": "uniform", "_value": [0, 0.5]}}, "layr1"),
        ({"prune": {"target": "macs"}}, {"prune.groups.layer1": {"_type": "uniform", "_value": [0, 0.5]}}, "target"),
        ({"objective": {"macs": None}}, {"prune.groups.layer1": {"_type": "uniform", "_value": [0, 0.5]}}, "no budget"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any, space: Any, words: str
) -> None:
    write(tmp_path, **changes)
    monkeypatch.chdir(tmp_path)
    one = AMCTuner(recipe="recipe.yml")
    with pytest.raises(SearchError, match=words) as caught:
        one.update_search_space(space)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "recipe is missing"),
        ({"recipe": "r.yml", "budget": {"flops": 1}}, "budget"),
        ({"recipe": "r.yml", "warmup": -1}, "warmup"),
        ({"recipe": "r.yml", "noise": "x"}, "noise"),
        ({"recipe": "r.yml", "optimize_mode": "maximize"}, "optimize_mode"),
        ({"recipe": "r.yml", "environment": 1}, "environment"),
    ],
)
def test_wrong_class_arguments_are_named_in_one_line(arguments: Any, words: str) -> None:
    with pytest.raises(SearchError, match=words) as caught:
        AMCClassArgsValidator().validate_class_args(**arguments)
    assert "\n" not in str(caught.value)

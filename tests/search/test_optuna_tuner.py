"""Optuna's samplers behind NNI's interface: order, failures, resume, fronts, cost."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import nni
import pytest

from nni_plugins.search.errors import SearchError
from nni_plugins.search.optuna_samplers import SAMPLERS
from nni_plugins.search.optuna_tuner import OptunaClassArgsValidator, OptunaTuner

SPACE: dict[str, Any] = {
    **{f"prune.groups.g{i}": {"_type": "uniform", "_value": [0, 0.8]} for i in range(6)},
    "pruner": {
        "_type": "choice",
        "_value": [{"_name": "magnitude"}, {"_name": "taylor", "steps": {"_type": "randint", "_value": [1, 9]}}],
    },
}
TWO = [{"name": "accuracy", "direction": "maximize"}, {"name": "macs", "direction": "minimize"}]


def result(parameters: dict[str, Any]) -> dict[str, Any]:
    sparsity = [parameters[f"prune.groups.g{i}"] for i in range(6)]
    macs = 1 - sum(sparsity) / 6
    accuracy = 1 - sum((s - 0.1 * i) ** 2 for i, s in enumerate(sparsity)) / 3
    broken = {"macs": macs / 0.7 - 1} if macs > 0.7 else {}
    return {
        "default": accuracy - 10 * sum(broken.values()),
        "accuracy": accuracy,
        "macs": macs,
        "feasible": not broken,
        "broken_bounds": broken,
    }


def tuner(space: dict[str, Any] | None = None, **arguments: Any) -> OptunaTuner:
    made = OptunaTuner(**{"seed": 0, **arguments})
    made.update_search_space(space or SPACE)
    return made


def run(one: Any, trials: int, start: int = 0) -> list[dict[str, Any]]:
    found = []
    for number in range(start, start + trials):
        parameters = one.generate_parameters(number)
        found.append(result(parameters))
        one.receive_trial_result(number, parameters, found[-1], trial_job_id=f"t{number}")
        one.trial_end(number, True)
    return found


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_every_sampler_suggests_and_learns(sampler: str) -> None:
    arguments = {"n_startup_trials": 5, "sampler_args": {"population_size": 6} if "nsga" in sampler else None}
    trials = 7 if sampler == "gp" else 14
    one = tuner(sampler=sampler, **arguments)
    found = run(one, trials)
    front = one.pareto_front()
    best = max(item["default"] for item in found if item["feasible"])
    assert front[0]["values"] == {"default": best}
    assert run(tuner(sampler=sampler, **arguments), trials) == found  # the seed makes it repeatable


@pytest.mark.parametrize(("sampler", "trials"), [("tpe", 60), ("nsga2", 240)])
def test_it_finds_more_than_random_does(sampler: str, trials: int) -> None:
    def best(name: str, seed: int) -> float:
        return max(item["default"] for item in run(tuner(sampler=name, seed=seed), trials) if item["feasible"])

    assert sum(best(sampler, seed) for seed in range(2)) > sum(best("random", seed) for seed in range(2))


def test_front_is_what_none_beats_and_constraints_hold_in_it() -> None:
    one = tuner(sampler="tpe", objectives=TWO, constraints=[{"name": "accuracy", "min": 0.8}])
    found = run(one, 40)
    wanted = {
        (a["accuracy"], a["macs"])
        for a in found
        if a["accuracy"] >= 0.8
        and not any(
            b["accuracy"] >= a["accuracy"] and b["macs"] <= a["macs"] and b != a and b["accuracy"] >= 0.8 for b in found
        )
    }
    front = one.pareto_front()
    assert {(item["values"]["accuracy"], item["values"]["macs"]) for item in front} == wanted
    assert all(item["trial"] == f"t{item['number']}" for item in front)


def test_several_at_once_out_of_order_and_failed() -> None:
    one = tuner(n_startup_trials=3)
    asked = one.generate_multiple_parameters(list(range(12)))
    assert len({json.dumps(p, sort_keys=True) for p in asked}) == 12
    one.trial_end(4, False)
    one.trial_end(4, False)
    one.receive_trial_result(5, asked[5], {"accuracy": 1})  # no default: counts as failed, and nothing is raised
    one.receive_trial_result(6, asked[6], float("nan"))
    one.trial_end(7, False)
    one.receive_trial_result(7, asked[7], 0.5)  # the result of a trial that was stopped early
    for number in (11, 0, 3, 2):
        one.receive_trial_result(number, asked[number], result(asked[number]))
        one.receive_trial_result(number, asked[number], result(asked[number]))
    one.receive_trial_result(99, asked[1], 0.1)  # nobody asked for it
    states = [trial.state.name for trial in one._study.get_trials(deepcopy=False)]
    assert states.count("COMPLETE") == 6
    assert states.count("RUNNING") == 12 - 4 - 4
    assert len(one.journal.done()) == 8


def test_killed_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.setenv("NNI_CHECKPOINT_DIRECTORY", str(tmp_path / "checkpoint"))
    for sampler in ("nsga2", "tpe"):
        (tmp_path / "checkpoint" / "optuna.jsonl").unlink(missing_ok=True)
        arguments = {"sampler": sampler, "objectives": TWO, "sampler_args": {"population_size": 8}}
        if sampler == "tpe":
            arguments.pop("sampler_args")
        one = tuner(**arguments)
        found = run(one, 20)
        cut_off = one.generate_parameters(20)
        with (tmp_path / "checkpoint" / "optuna.jsonl").open("a") as file:
            file.write('{"event": "asked", "para')  # the process died here
        front = one.pareto_front()

        two = OptunaTuner(seed=0, **arguments)
        two.load_checkpoint()
        two.update_search_space(SPACE)
        assert two.pareto_front() == front
        # what NNI sends after a resume: all finished trials with their ids, an import without one, the one cut off
        finished = [
            {"parameter": record.parameters, "value": record.value, "trialJobId": record.job}
            for record in one.journal.done()
        ]
        other = {"parameter": {**cut_off, "prune.groups.g0": 0.123}, "value": result(cut_off)}
        for _ in range(2):
            two.import_data(finished)
            two.import_data([dict(other)])
        two.import_data([{"parameter": cut_off, "value": result(cut_off)}])
        assert len(two.journal.done()) == 22
        complete = [t for t in two._study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
        assert len(complete) == 22
        more = run(two, 6)
        assert not any(item in found for item in more)  # it does not begin again
        state = json.loads((tmp_path / "pareto.json").read_text())
        assert state["finished"] == 28
        assert state["front"] == two.pareto_front()

        three = tuner(**arguments)
        assert len(three.journal.done()) == 28
        assert three.pareto_front() == two.pareto_front()
        if sampler == "nsga2":
            ours = [t.system_attrs["NSGAIISampler:generation"] for t in three._study.get_trials(deepcopy=False)]
            assert max(ours) == 28 // 8 - (28 % 8 == 0)


def test_a_discrete_space_is_searched_without_repeats_to_its_end() -> None:
    space = {"a": {"_type": "choice", "_value": ["x", "y"]}, "b": {"_type": "quniform", "_value": [0, 1, 0.25]}}
    for sampler in ("tpe", "nsga2", "random"):
        one = tuner(space, sampler=sampler, n_startup_trials=2)
        seen = set()
        for number in range(10):
            parameters = one.generate_parameters(number)
            seen.add((parameters["a"], parameters["b"]))
            one.receive_trial_result(number, parameters, parameters["b"])
        assert len(seen) == 10
        with pytest.raises(nni.NoMoreTrialError):
            one.generate_parameters(10)
        assert one.generate_multiple_parameters([11, 12]) == []


def test_results_of_another_space_are_kept_but_not_learnt() -> None:
    one = tuner()
    run(one, 3)
    one.import_data([{"parameter": {"something": 1}, "value": 0.3}])
    one.update_search_space({"b": {"_type": "uniform", "_value": [0, 1]}})
    assert set(one.generate_parameters(50)) == {"b"}
    assert len(one.journal.done()) == 4


def test_calls_from_two_threads() -> None:
    one = tuner(sampler="random")
    errors: list[BaseException] = []

    def work(first: int) -> None:
        try:
            run(one, 40, first)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(one.journal.done()) == 120


@pytest.mark.parametrize("objectives", [None, TWO])
@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_suggestion_after_a_thousand_trials_takes_less_than_50_ms(sampler: str, objectives: Any) -> None:
    one, rng = tuner(sampler=sampler, objectives=objectives), random.Random(0)
    data = []
    for _ in range(1000):
        parameters = {f"prune.groups.g{i}": rng.uniform(0, 0.8) for i in range(6)}
        parameters["pruner"] = {"_name": "taylor", "steps": rng.randrange(1, 9)}
        data.append({"parameter": parameters, "value": {**result(parameters), "accuracy": rng.random()}})
    one.import_data(data)
    run(one, 2, 1000)
    start = time.process_time()
    run(one, 8, 2000)
    assert (time.process_time() - start) / 8 < 0.05


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sampler": "tpr"}, "tpr"),
        ({"sampler_args": {"populaton_size": 3}}, "populaton_size"),
        ({"sampler": "nsga2", "sampler_args": {"population_size": 1}}, "population_size"),
        ({"optimize_mode": "max"}, "optimize_mode"),
        ({"objectives": []}, "objectives"),
        ({"objectives": [{"name": "a", "direction": "up"}]}, "direction"),
        ({"objectives": [{"name": "a"}, {"name": "a"}]}, "twice"),
        ({"sampler": "cmaes", "objectives": TWO}, "one objective"),
        ({"constraints": [{"name": "macs"}]}, "min or max"),
        ({"seed": "x"}, "seed"),
        ({"n_startup_trials": -1}, "n_startup_trials"),
        ({"samplr": "tpe"}, "samplr"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(SearchError, match=words) as caught:
        OptunaClassArgsValidator().validate_class_args(**arguments)
    assert "\n" not in str(caught.value)

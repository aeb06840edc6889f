"""The configuration of an architecture search, its strategies, and one trial of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import nni
import numpy as np
import pytest
import yaml
from nni.nas.space import SimplifiedModelSpace

from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.launch import find_config
from nni_plugins.experiment.nas import export_top_models, make_experiment
from nni_plugins.experiment.nas_check import check
from nni_plugins.experiment.nas_config import NasSettings, is_nas, load_nas_config, read_settings
from nni_plugins.experiment.nas_evaluation import RecipeEvaluation, limits_of, recipe_for
from nni_plugins.experiment.nas_strategy import make_strategy, recall
from nni_plugins.experiment.trials import Trial, from_rest
from nni_plugins.search.pruned_space import PrunedSpace
from nni_plugins.training.recipe import load_recipe, recipe_from_dict
from tests.search.spaces import joint

SPACE = "tests.search.spaces:joint"
RECIPE = {
    "data": {"name": "digits", "limit": 200},
    "train": {"epochs": 1, "threads": 1},
    "finetune": {"epochs": 1},
    "objective": {"macs": 0.9},
}
CONFIG: dict[str, Any] = {
    "experimentName": "architectures",
    "nas": {"space": SPACE, "strategy": {"name": "Random", "classArgs": {"seed": 1}}},
    "trialConcurrency": 1,
    "maxTrialNumber": 3,
    "trainingService": {"platform": "local"},
}
SAMPLE = {"width": 8, "kernel": 1, "depth": 2, "kind": "narrow", "keep:stem": 1.0, "keep:body": 0.5, "keep:mix": 0.25}


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    (folder / "config.yml").write_text(yaml.safe_dump({**CONFIG, **changes}), encoding="utf-8")
    return folder / "config.yml"


def test_the_shipped_experiment_is_read_and_its_space_stays_small() -> None:
    path = find_config(Path(__file__).parents[2] / "experiments" / "digits_nas")
    assert is_nas(path)
    config, settings = load_nas_config(path, trials=4)
    experiment = make_experiment(config, settings, path)
    space = SimplifiedModelSpace.from_model(experiment.model_space, experiment.evaluator)
    sample: dict[str, Any] = {}
    payload = nni.dump(space.random(sample, np.random.RandomState(0)))
    assert len(payload) < 2000
    assert set(sample) == {*experiment.model_space.simplify()}
    assert nni.load(payload).sample == sample
    (trial,) = from_rest(
        [{"trialJobId": "a", "status": "RUNNING", "hyperParameters": [f'{{"parameter_id":0,"parameters":{payload}}}']}]
    )
    assert trial.parameters == sample


def test_the_file_is_nnis_and_the_command_line_changes_it(tmp_path: Path) -> None:
    config, settings = load_nas_config(write(tmp_path / "e"), tmp_path / "elsewhere", trials=7, concurrency=2)
    assert (config.max_trial_number, config.trial_concurrency) == (7, 2)
    assert config.experiment_working_directory == str(tmp_path / "elsewhere")
    assert config.trial_code_directory == str(tmp_path / "e")
    assert config.trial_command.endswith("-m nni_plugins.experiment.nas_trial")
    assert settings == NasSettings(SPACE, strategy="Random", arguments={"seed": 1})
    assert copy.deepcopy(config).canonical_copy().json()["trialCommand"] == config.trial_command


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tuner": {"name": "TPE"}}, "tuner has no place beside a nas section: the algorithm is nas.strategy"),
        ({"searchSpace": {}}, "searchSpace has no place beside a nas section"),
        ({"nas": {"space": "somewhere"}}, r"nas.space is 'somewhere'; it must be module:function"),
        ({"nas": {"space": SPACE, "strategie": "TPE"}}, "nas.strategie is not a field; known: space, recipe, strategy"),
        ({"nas": {"space": SPACE, "strategy": "Evolution"}}, "nas.strategy is 'Evolution'; known: Random, GridSearch"),
        ({"nas": {"space": SPACE, "top": 0}}, "nas.top is 0"),
        ({"nas": None}, "nas must be a section"),
        ({"maxTrialNumbre": 3}, "NNI refuses this configuration: .*maxtrialnumbre"),
        ({"trialConcurrency": None}, "NNI refuses this configuration"),
    ],
)
def test_mistakes_in_the_file_are_one_line(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ExperimentError, match=words) as error:
        load_nas_config(write(tmp_path, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("Random", {"sede": 1}, "nas.strategy Random has no argument sede"),
        ("RegularizedEvolution", {"population_size": 2, "sample_size": 4}, "refuses its classArgs: sample_size must"),
        ("TPE", {"optimize_mode": "minimize"}, "set optimize_mode: maximize"),
        ("TPE", {"seeds": 1}, "refuses its classArgs"),
        ("nowhere:Thing", {}, "no module nowhere"),
        ("tests.search.spaces:Plain", {}, "is no strategy of nni.nas"),
    ],
)
def test_mistakes_in_the_strategy_are_one_line(name: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ExperimentError, match=words):
        make_strategy(NasSettings(SPACE, strategy=name, arguments=arguments), Path("config.yml"))


def test_reinforcement_learning_says_which_packages_it_lacks() -> None:
    settings = NasSettings(SPACE, strategy="PolicyBasedRL")
    try:
        import tianshou  # noqa: F401
    except ImportError:
        with pytest.raises(ExperimentError, match="needs tianshou and gym, which are not installed"):
            make_strategy(settings, Path("config.yml"))
    else:
        make_strategy(settings, Path("config.yml"))


def test_a_space_that_does_not_work_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, nas={"space": "tests.search.spaces:missing"})
    with pytest.raises(ExperimentError, match=r"nas.space tests.search.spaces:missing: .* has no missing"):
        make_experiment(*load_nas_config(path), path)
    path = write(tmp_path, nas={"space": "tests.search.spaces:Plain"})
    with pytest.raises(ExperimentError, match="returned Plain, not a ModelSpace"):
        make_experiment(*load_nas_config(path), path)


def test_strategies_recall_what_was_tried() -> None:
    finished = [({"a": 1, "b": 0.5}, 0.3), ({"a": 2, "b": 0.5}, None), ({"a": 3, "b": 0.5}, 0.9), ({"a": 4}, 0.1)]
    evolution = make_strategy(
        NasSettings("a:b", arguments={"population_size": 2, "sample_size": 2}), Path("config.yml")
    )
    recall(evolution, finished)
    assert [one.y for one in evolution._population] == [0.9, 0.1]  # the oldest went
    assert evolution.best_parent() == {"a": 3, "b": 0.5}
    from nni.nas.strategy.utils import DuplicationError

    with pytest.raises(DuplicationError):
        evolution._dedup_helper.dedup({"a": 2, "b": 0.5})
    tpe = make_strategy(NasSettings("a:b", strategy="TPE", arguments={"seed": 0}), Path("config.yml"))
    recall(tpe, [({"a": 1}, 0.3), ({"a": 2}, 0.9)])
    tpe.tuner.update_search_space({"a": {"_type": "choice", "_value": [1, 2, 3]}})
    assert sorted(record.loss for records in tpe.tuner._history.values() for record in records) == [-0.9, -0.3]


def test_bounds_are_shares_of_the_default_architecture(tmp_path: Path) -> None:
    recipe = recipe_from_dict({**RECIPE, "objective": {"macs": 0.5, "params": 20_000, "bytes": 0.5}})
    default = joint().survey.default
    recipe_for(recipe, SPACE, {**default, "keep:stem": np.float64(0.5)}).save(tmp_path / "recipe.yml")  # plain data
    limits = limits_of(recipe, SPACE, default)
    from nni_plugins.channels import ChannelGraph
    from nni_plugins.search.pruned_space import architecture

    model = architecture(SPACE, default)
    macs = ChannelGraph.watch(model, recipe_input()).cost().macs
    assert set(limits) == {"objective.macs", "objective.bytes"}
    assert limits["objective.macs"] == pytest.approx(macs / 2)
    assert limits_of(recipe.with_values({"objective": {"metric": "macs"}}), SPACE, default) == {
        "objective.reference": macs
    }
    assert limits_of(recipe.with_values({"objective": {"metric": "macs", "reference": 7}}), SPACE, default) == {}
    assert (
        limits_of(recipe.with_values({"objective": {"metric": "latency_ms"}}), SPACE, default)["objective.reference"]
        > 0
    )


def recipe_input() -> Any:
    import torch

    return torch.zeros(1, 1, 8, 8)


def test_a_trial_is_the_recipe_with_the_architecture_and_the_sparsities_of_its_groups(tmp_path: Path) -> None:
    path = write(tmp_path).with_name("recipe.yml")
    base = load_recipe(path)
    recipe = recipe_for(base, SPACE, SAMPLE)
    assert recipe.prune.groups == {"stem.0": 0.0, "body.0.0": 0.5, "body.1.0": 0.5, "mix.1": 0.75}
    assert recipe.prune.target == "channels"
    other = recipe_for(base, SPACE, {**SAMPLE, "keep:body": 1.0})
    assert other.dense_key() == recipe.dense_key()  # one dense training for one architecture
    assert recipe_for(base, SPACE, {**SAMPLE, "depth": 1}).dense_key() != recipe.dense_key()

    metrics = RecipeEvaluation(str(path), SPACE, {"objective.macs": 1e9}).run(SAMPLE, tmp_path / "trial")
    assert metrics["sparsity"] == {"body.0.0": 0.5, "body.1.0": 0.5, "mix.1": 0.75}
    assert metrics["relative_error"] < 1e-5
    assert metrics["feasible"]
    assert check(tmp_path / "trial").startswith("trial: loaded again in a process of its own")
    space = PrunedSpace.named(SPACE)
    from nni_plugins.speedup import load_compact

    compact = load_compact(tmp_path / "trial" / "compact.safetensors", lambda: space.architecture(SAMPLE))
    assert sum(p.numel() for p in compact.parameters()) == metrics["params"]
    assert [compact.body[0][0].out_channels, compact.mix[1].out_channels] == [4, 3]

    record = json.loads((tmp_path / "trial" / "metrics.json").read_text(encoding="utf-8"))
    (tmp_path / "trial" / "metrics.json").write_text(json.dumps({**record, "accuracy": 2.0}), encoding="utf-8")
    trial = Trial("a", 0, "SUCCEEDED", SAMPLE, record, folder=tmp_path / "trial")
    with pytest.raises(ExperimentError, match=r"does not come back from its file: .* not 2\.0000"):
        export_top_models([trial], 1, tmp_path / "out", print)


def test_an_architecture_that_keeps_everything_is_a_trial_too(tmp_path: Path) -> None:
    path = write(tmp_path).with_name("recipe.yml")
    whole = {**SAMPLE, "keep:body": 1.0, "keep:mix": 1.0, "depth": 1}
    metrics = RecipeEvaluation(str(path), SPACE).run(whole, tmp_path / "trial")
    assert metrics["sparsity"] == {}
    assert metrics["macs"] == metrics["dense"]["macs"]


def test_what_cannot_meet_a_bound_is_not_trained_and_ranks_last(tmp_path: Path) -> None:
    path = write(tmp_path).with_name("recipe.yml")
    cheap, costly = {**SAMPLE, "depth": 1}, {**SAMPLE, "width": 16, "keep:body": 1.0}
    runs = [
        RecipeEvaluation(str(path), SPACE, {"objective.macs": 30_000}).run(s, tmp_path / s["kind"]) for s in (costly,)
    ]
    assert not runs[0]["feasible"]
    assert runs[0]["default"] < -0.5
    assert load_recipe(tmp_path / costly["kind"] / "recipe.yml").train.epochs == 0
    assert recipe_for(load_recipe(path).with_values({"objective.macs": 30_000}), SPACE, cheap).train.epochs == 1


def test_settings_take_a_strategy_by_name_alone() -> None:
    assert read_settings({"space": SPACE, "strategy": "TPE"}, Path("c")).strategy == "TPE"

"""Search spaces: written from a model, checked before an experiment starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from nni_plugins.channels import ChannelGraph
from nni_plugins.cli import commands
from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.launch import load_config, recipe_of
from nni_plugins.search.errors import SearchError
from nni_plugins.search.spaces import (
    check_against,
    check_space,
    dump_space,
    load_space,
    ranking_space,
    sparsity_space,
    stages,
)
from nni_plugins.training.errors import RecipeError
from nni_plugins.training.recipe import recipe_from_dict

ROOT = Path(__file__).parents[2]
GOOD = {
    "prune.sparsity": {"_type": "uniform", "_value": [0.1, 0.9]},
    "prune.pruner": {
        "_type": "choice",
        "_value": [
            {"_name": "magnitude"},
            {"_name": "taylor", "prune.arguments.training_steps": {"_type": "choice", "_value": [10, 30]}},
        ],
    },
    "finetune.epochs": {"_type": "randint", "_value": [1, 5]},
}


@pytest.mark.parametrize("path", sorted((ROOT / "search_spaces").glob("*.yml")), ids=lambda path: path.stem)
def test_every_shipped_space_is_valid_and_says_what_it_is(path):
    space = load_space(path)
    assert path.read_text().startswith("# ")
    check_against(space, recipe_from_dict({}), path.name)


def test_what_is_written_is_read_back(tmp_path):
    (tmp_path / "space.yml").write_text(dump_space(GOOD, "two lines\nof header", {"prune.sparsity": "a note"}))
    assert load_space(tmp_path / "space.yml") == GOOD


BAD = {
    "a list": ([], "must be names"),
    "nothing": ({}, "must be names"),
    "no type": ({"prune.sparsity": {"_value": [0, 1]}}, "must have _type and _value"),
    "a number": ({"prune.sparsity": 3}, "must have _type and _value"),
    "unknown type": ({"prune.sparsity": {"_type": "unifrom", "_value": [0, 1]}}, "did you mean uniform"),
    "empty choice": ({"prune.sparsity": {"_type": "choice", "_value": []}}, "a list of values"),
    "one end": ({"prune.sparsity": {"_type": "uniform", "_value": [0.1]}}, r"\[low, high\]"),
    "falling": ({"prune.sparsity": {"_type": "uniform", "_value": [0.9, 0.1]}}, "low must be below high"),
    "text": ({"prune.sparsity": {"_type": "uniform", "_value": ["a", "b"]}}, r"\[low, high\]"),
    "log of 0": ({"finetune.learning_rate": {"_type": "loguniform", "_value": [0, 1]}}, "above 0 for a logarithm"),
    "no step": ({"prune.sparsity": {"_type": "quniform", "_value": [0, 1]}}, "step"),
    "step 0": ({"prune.sparsity": {"_type": "quniform", "_value": [0, 1, 0]}}, "step must be above 0"),
    "deviation": ({"prune.sparsity": {"_type": "normal", "_value": [0, -1]}}, "deviation must be above 0"),
    "randint": ({"finetune.epochs": {"_type": "randint", "_value": [1.5, 3]}}, "whole numbers"),
    "infinite": ({"prune.sparsity": {"_type": "uniform", "_value": [0, float("inf")]}}, r"\[low, high\]"),
    "branch": ({"prune.pruner": {"_type": "choice", "_value": [{"a": 1}]}}, "needs _name"),
    "in a branch": (
        {"prune.pruner": {"_type": "choice", "_value": [{"_name": "taylor", "prune.sparsity": {"_type": "x"}}]}},
        "taylor.prune.sparsity",
    ),
    "some sections": ({"prune.pruner": {"_type": "choice", "_value": ["l0", {"_name": "taylor"}]}}, "write each as"),
    "more keys": ({"prune.sparsity": {"_type": "choice", "_value": [1], "_vaule": 3}}, "_vaule"),
}


@pytest.mark.parametrize(("space", "says"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_one_line(space, says):
    with pytest.raises(SearchError, match=says) as error:
        check_space(space, "space.yml")
    assert str(error.value).startswith("space.yml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "spec", "says"),
    [
        ("prune.sparsty", {"_type": "uniform", "_value": [0, 0.5]}, "did you mean prune.sparsity"),
        ("prune.sparsity", {"_type": "uniform", "_value": [0, 1.5]}, "must be in"),
        ("finetune.epochs", {"_type": "uniform", "_value": [0, 2.5]}, "whole number"),
        ("prune.target", {"_type": "choice", "_value": ["macs", "flops"]}, "must be one of"),
        (
            "prune.pruner",
            {"_type": "choice", "_value": [{"_name": "taylor", "prune.sparsty": {"_type": "choice", "_value": [1]}}]},
            "did you mean",
        ),
    ],
)
def test_a_space_that_does_not_fit_the_recipe_is_refused(name, spec, says):
    with pytest.raises(RecipeError, match=says):
        check_against(check_space({name: spec}), recipe_from_dict({}))


def test_a_cost_of_searched_architectures_needs_one_scale():
    space = check_space({"model.arguments.width": {"_type": "choice", "_value": [8, 16]}})
    with pytest.raises(
        RecipeError, match=r"space: model\.arguments\.width .* objective\.metric: macs needs objective\.ref"
    ):
        check_against(space, recipe_from_dict({"objective": {"metric": "macs"}}))
    check_against(space, recipe_from_dict({"objective": {"metric": "macs", "reference": 1000}}))
    check_against(check_space(GOOD), recipe_from_dict({"objective": {"metric": "macs"}}))


def test_an_experiment_whose_space_does_not_fit_does_not_start(tmp_path):
    for name in ("config.yml", "recipe.yml"):
        (tmp_path / name).write_text((ROOT / "experiments" / "digits" / name).read_text())
    (tmp_path / "space.yml").write_text("prune.sparsty: {_type: uniform, _value: [0, 0.5]}\n")
    config = tmp_path / "config.yml"
    config.write_text(config.read_text().replace("../../search_spaces/resnet_stages.yml", "space.yml"))
    with pytest.raises(ExperimentError, match=r"space\.yml: prune\.sparsty .*did you mean prune\.sparsity"):
        load_config(config)


@pytest.mark.parametrize(
    ("tuner", "says"),
    [
        ("{className: nni_plugins.search.OptunaTuner, codeDirectory: ., classArgs: {sampler: tpee}}", "tpee"),
        (
            "{className: nni_plugins.search.AMCTuner, codeDirectory: ., classArgs: {recipe: recipe.yml, noise: -1}}",
            "noise",
        ),
        (
            "{className: nni_plugins.search.LeGRTuner, codeDirectory: ., classArgs: {populaton_size: 3}}",
            "populaton_size",
        ),
    ],
)
def test_a_wrong_argument_of_our_tuners_does_not_start(tmp_path, tuner, says):
    (tmp_path / "recipe.yml").write_text((ROOT / "experiments" / "digits" / "recipe.yml").read_text())
    text = (ROOT / "experiments" / "digits" / "config.yml").read_text()
    text = text.replace("../../search_spaces", str(ROOT / "search_spaces"))
    head, _, tail = text.partition("tuner:\n")
    text = f"{head}tuner: {tuner}\n{tail[tail.index('trainingService') :]}"
    (tmp_path / "config.yml").write_text(text)
    with pytest.raises(ExperimentError, match=says) as error:
        load_config(tmp_path / "config.yml")
    assert "\n" not in str(error.value)


def test_every_shipped_experiment_is_accepted():
    for path in sorted((ROOT / "experiments").glob("*/config.yml")):
        if "nas:" not in path.read_text():
            load_config(path)


def test_the_recipe_of_a_command():
    assert recipe_of("python -m nni_plugins.trial recipe.yml", "/a") == Path("/a/recipe.yml")
    assert recipe_of("cd b && /usr/bin/python -m nni_plugins.trial ../r.yml", "/a") == Path("/a/../r.yml")
    assert recipe_of("python train.py", "/a") is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["conv1", "layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1"], ["conv1", "layer1", "layer2"]),
        (["features.0", "features.3.conv", "features.3.expand"], ["features.0", "features.3"]),
        (["net.body.0", "net.body.2", "net.body.4"], ["net.body.0", "net.body.2", "net.body.4"]),
        (["fc"], ["fc"]),
        (["a.q:heads", "a.q:dims"], ["a.q"]),
    ],
)
def test_stages(names, expected):
    assert stages(names) == expected


def _groups():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(12 * 16, 2))
    graph = ChannelGraph.watch(model, torch.randn(1, 3, 8, 8))
    return [group for group in graph.groups if group.prunable]


def test_spaces_of_a_model_fit_its_recipe():
    groups = _groups()
    for space in (sparsity_space(groups), sparsity_space(groups, levels=5), ranking_space(groups)):
        check_against(check_space(space), recipe_from_dict({}))
    assert sparsity_space(groups, levels=3, highest=0.5)["prune.groups.0"]["_value"] == [0.0, 0.25, 0.5]
    for wrong in ({"lowest": 0.5, "highest": 0.4}, {"highest": 1.0}, {"levels": 1}, {"per": "layer"}):
        with pytest.raises(SearchError):
            sparsity_space(groups, **wrong)


def test_the_command_writes_a_space_that_is_valid(tmp_path):
    recipe = str(ROOT / "experiments" / "digits" / "recipe.yml")
    for arguments in (["--per", "stage"], ["--levels", "4"], ["--kind", "ranking"], ["--json"]):
        path = tmp_path / "space.yml"
        result = CliRunner().invoke(commands, ["space", recipe, *arguments, "--output", str(path)])
        assert result.exit_code == 0, result.output
        space = load_space(path)
        check_against(space, recipe_from_dict({}))
        if "--json" in arguments:
            assert json.loads(path.read_text()) == space
    result = CliRunner().invoke(commands, ["space", recipe, "--highest", "1.2"])
    assert result.exit_code == 1
    assert "Traceback" not in result.output


def test_a_model_that_does_not_run_is_one_line(tmp_path):
    (tmp_path / "recipe.yml").write_text("model: {name: resnet8, arguments: {shape: [3, 32, 32], classes: 10}}\n")
    result = CliRunner().invoke(commands, ["space", str(tmp_path / "recipe.yml")])
    assert result.exit_code == 1
    assert "the model fails on 1x1x8x8" in result.output
    assert len(result.output.strip().splitlines()) == 1

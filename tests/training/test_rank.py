"""Allocations ranked before fine-tuning (EagleEye)."""

from __future__ import annotations

import json

import pytest
import torch

from nni_plugins.channels import ChannelGraph
from nni_plugins.training.data import build_data
from nni_plugins.training.dense import dense_model, prepare_dense
from nni_plugins.training.errors import CompressionError, RecipeError
from nni_plugins.training.loop import Loop
from nni_plugins.training.pipeline import compress
from nni_plugins.training.rank import rank
from nni_plugins.training.recipe import recipe_from_dict

TREE = {
    "model": {"name": "resnet8", "arguments": {"width": 8}},
    "data": {"limit": 600},
    "train": {"epochs": 6, "threads": 1},
    "prune": {"sparsity": 0.5},
    "rank": {"candidates": 6, "batches": 4},
    "finetune": {"epochs": 0},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return prepare_dense(recipe_from_dict(TREE), tmp_path_factory.mktemp("dense"), lambda line: None)


def _parts(dense, **changes):
    recipe = recipe_from_dict(TREE).with_values(changes)
    data = build_data(recipe)
    model = dense_model(recipe, data, dense.path)
    return recipe, model, Loop(recipe, data, "rank"), ChannelGraph.watch(model, data.example)


def test_all_candidates_meet_the_budget_and_the_best_is_taken(dense):
    recipe, model, loop, graph = _parts(dense)
    pruned, ranked = rank(recipe, model, loop, graph)
    assert len(ranked) == 6
    assert len({str(item.sparsities) for item in ranked}) == 6
    assert all(item.macs <= 0.5 * dense.macs for item in ranked)
    assert ranked[0].metric == max(item.metric for item in ranked)
    assert pruned.plan.cost().macs == ranked[0].macs
    for module, targets in pruned.masks.items():
        for name, mask in targets.items():
            weight = dict(model.named_parameters())[f"{module}.{name}"]
            assert torch.equal(weight * mask, weight)


def test_the_statistics_are_each_candidates_own(dense):
    """With the dense model's statistics the ranking would be chance: recalibrated candidates are far better."""
    own = rank(*_parts(dense))[1]
    stale = rank(*_parts(dense, **{"rank.batches": 0}))[1]
    assert sum(item.metric for item in own) > sum(item.metric for item in stale)


def test_one_sparsity_for_all_groups_below_a_prefix(dense):
    recipe, model, loop, graph = _parts(
        dense, **{"prune.groups.layer1": 0.5, "prune.groups.layer2": 0.5, "prune.target": "channels"}
    )
    _, ranked = rank(recipe, model, loop, graph)
    assert len(ranked) == 6
    drawn = [item for item in ranked if len(set(item.sparsities.values())) > 1]
    assert len(drawn) >= 4  # the recipe's own allocation is not drawn
    for item in drawn:
        shares = [share for name, share in item.sparsities.items() if name.startswith("layer2")]
        assert max(shares, default=0) - min(shares, default=0) <= 1 / 16  # but for rounding: 16 channels each


@pytest.mark.parametrize("target", ["params", "channels"])
def test_other_targets(dense, target):
    _, ranked = rank(*_parts(dense, **{"prune.target": target, "rank.candidates": 3}))
    assert len(ranked) == 3
    if target == "params":
        assert all(item.params <= 0.5 * dense.params for item in ranked)


@pytest.mark.parametrize(("pruner", "units"), [("block", "whole blocks"), ("weight_magnitude", "single weights")])
def test_pruners_of_other_units_are_refused_before_the_dense_training(tmp_path, pruner, units):
    recipe = recipe_from_dict({**TREE, "prune": {"pruner": pruner, "sparsity": 0.5, "target": "params"}})
    with pytest.raises(RecipeError, match=rf"rank\.candidates: {pruner} removes {units}"):
        prepare_dense(recipe, tmp_path, lambda line: None)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_pruner_without_scores_is_refused_in_one_line(dense):
    with pytest.raises(CompressionError, match="rank: nni:L1NormPruner scores no channel groups"):
        rank(*_parts(dense, **{"prune.pruner": "nni:L1NormPruner", "prune.target": "channels"}))


def test_a_compression_with_it_leaves_the_ranking(dense, tmp_path):
    recipe = recipe_from_dict(TREE).with_values({"search.mode": "quick"})
    metrics = compress(recipe, tmp_path, dense)
    ranking = json.loads((tmp_path / "ranking.json").read_text())
    assert len(ranking) == 6
    assert metrics["macs"] == ranking[0]["macs"]
    assert metrics["finetuned"] is False
    assert metrics["accuracy"] == pytest.approx(ranking[0]["metric"], abs=0.1)


def test_a_quick_trial_does_not_train(dense, tmp_path):
    epochs = []
    recipe = recipe_from_dict(TREE).with_values({"search.mode": "quick", "finetune.epochs": 3, "rank.candidates": 0})
    metrics = compress(recipe, tmp_path, dense, epochs.append)
    assert epochs == []
    assert metrics["finetuned"] is False
    assert metrics["relative_error"] < 1e-5


@pytest.mark.parametrize(("bound", "value"), [("bytes", 0.01), ("latency_ms", 1e-6), ("macs", 0.01), ("params", 0.01)])
def test_what_breaks_a_bound_on_any_cost_finds_out_before_training(dense, tmp_path, bound, value):
    epochs = []
    recipe = recipe_from_dict(TREE).with_values(
        {"finetune.epochs": 2, "rank.candidates": 0, f"objective.{bound}": value}
    )
    metrics = compress(recipe, tmp_path, dense, epochs.append)
    assert epochs == []
    assert metrics["feasible"] is False
    assert list(metrics["broken_bounds"]) == [bound]
    assert metrics["default"] < -5


def test_learnt_scales_and_shifts_move_what_goes(dense, tmp_path):
    plain = recipe_from_dict(TREE).with_values({"search.mode": "quick", "rank.candidates": 0})
    one = compress(plain, tmp_path / "one", dense)
    two = compress(plain.with_values({"prune.shifts.layer3": 5.0}), tmp_path / "two", dense)
    assert not any(name.startswith("layer3") for name in two["sparsity"])
    assert any(name.startswith("layer3") for name in one["sparsity"])
    with pytest.raises(CompressionError, match=r"layer9"):
        compress(plain.with_values({"prune.scales.layer9": 2.0}), tmp_path / "three", dense)
    theirs = {"prune.scales.layer3": 2.0, "prune.pruner": "nni:L1NormPruner", "prune.target": "channels"}
    with pytest.raises(RecipeError, match=r"prune\.scales: nni:L1NormPruner"):
        compress(plain.with_values(theirs), tmp_path / "four", dense)


def test_a_nested_choice_sets_its_name_and_what_stands_beside_it():
    recipe = recipe_from_dict(TREE).with_values(
        {"prune.pruner": {"_name": "taylor", "prune.arguments.training_steps": 7}, "prune.sparsity": 0.25}
    )
    assert recipe.prune.pruner == "taylor"
    assert recipe.prune.arguments == {"training_steps": 7}
    assert recipe.prune.sparsity == 0.25

"""``prune.target: latency`` is met by the clock, and not only by the table."""

import copy

import pytest
import torch

from nni_plugins.channels import ChannelGraph
from nni_plugins.training import CompressionError, build_data, build_model, compress, latency_budget, recipe_from_dict
from nni_plugins.training.allocate import group_ratios, prunable_groups
from nni_plugins.training.dense import prepare_dense
from nni_plugins.training.latency_budget import NEAR, Timed, corrected, meet, nearest
from nni_plugins.training.loop import Loop
from nni_plugins.training.rank import rank

TREE = {
    "model": {"name": "resnet8"},
    "data": {"limit": 300},
    "train": {"epochs": 0, "threads": 1},
    "prune": {"target": "macs", "sparsity": 0.5},  # taken for what the table says, where the clock is another
    "finetune": {"epochs": 0},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    torch.set_num_threads(1)
    recipe = recipe_from_dict(TREE)
    data = build_data(recipe)
    model = build_model(recipe, data.shape, data.classes, 0)
    return recipe, model.eval(), Loop(recipe, data, "test"), ChannelGraph.watch(model, data.example)


def _parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_table_that_is_off_is_corrected(parts, monkeypatch):
    """By a clock that says that compact models take longer than the table thinks."""
    model = parts[1]
    before = copy.deepcopy(model.state_dict())
    clock = lambda models, inputs, threads: [1.0, 0.3 + 0.7 * _parameters(models[1]) / _parameters(models[0])]  # noqa: E731
    monkeypatch.setattr(latency_budget, "in_turns", clock)
    made = meet(*parts)
    best = nearest(made, 0.5)
    assert abs(made[0].time / 0.5 - 1) > NEAR
    assert abs(best.time - 0.5) < abs(made[0].time - 0.5)
    assert abs(best.time / 0.5 - 1) <= 0.1
    assert len({one.sparsity for one in made}) == len(made) > 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_correction_is_spread_over_the_groups_as_it_was(parts):
    recipe, model, _, graph = parts
    recipe = recipe.with_values({"prune.sparsity": 0.1, "prune.groups": {"layer1": 0.6}})
    found = corrected(recipe, 0.7, model, graph)
    assert found.prune.sparsity == 0.7
    groups = prunable_groups(recipe.prune, model, graph)
    assert group_ratios(found.prune, groups) == group_ratios(recipe.prune, groups)
    assert {0.1, 0.6} == set(group_ratios(found.prune, groups).values())
    plain = parts[0].with_values({"prune.sparsity": 0.2})
    assert corrected(plain, 0.3, model, graph).prune.groups == {}


def test_what_is_met_at_once_is_left(parts, monkeypatch):
    monkeypatch.setattr(latency_budget, "in_turns", lambda *_: [2.0, 1.01])
    assert meet(*parts) == [Timed(0.5, 0.505)]


def test_the_first_that_is_out_of_reach_is_an_error_and_a_later_one_is_not(parts, monkeypatch):
    recipe, *rest = parts
    with pytest.raises(CompressionError, match=r"out of reach|cannot"):
        meet(recipe.with_values({"prune.sparsity": 0.9, "prune.max_sparsity": 0.2}), *rest)
    monkeypatch.setattr(latency_budget, "in_turns", lambda *_: [1.0, 0.999])  # it never helps
    made = meet(*parts)
    assert 1 <= len(made) <= latency_budget.TRIES


@pytest.mark.alone
def test_the_pipeline_meets_it(parts, tmp_path):
    changes = {"prune.target": "latency", "prune.sparsity": 0.3, "model.name": "mlp"}
    recipe = parts[0].with_values({**changes, "model.arguments": {"hidden": [1024, 1024]}})
    dense = prepare_dense(recipe, tmp_path / "dense", lambda line: None)
    found = compress(recipe, tmp_path / "out", dense)["latency_budget"]
    assert found["asked"] == 0.7
    assert found["time"] == pytest.approx(0.7, rel=0.1)


def test_allocations_under_a_budget_on_latency_are_ranked(parts):
    recipe, model, loop, graph = parts
    pruned, ranked = rank(
        recipe.with_values(
            {"rank.candidates": 3, "rank.batches": 1, "prune.target": "latency", "prune.sparsity": 0.05}
        ),
        copy.deepcopy(model),
        loop,
        graph,
    )
    assert len(ranked) == 3
    assert pruned.plan is not None

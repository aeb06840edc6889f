"""Sparsities by group, scaled to a budget."""

import pytest

from nni_plugins.channels import ChannelGraph
from nni_plugins.training import CompressionError, RecipeError, build_data, build_model, recipe_from_dict
from nni_plugins.training.allocate import config_list, fit, group_ratios, prunable_groups


@pytest.fixture(scope="module")
def net():
    recipe = recipe_from_dict({})
    data = build_data(recipe)
    model = build_model(recipe, data.shape, data.classes, 0)
    return model, ChannelGraph.watch(model, data.example)


def settings_of(**prune):
    return recipe_from_dict({"prune": prune}).prune


def test_without_groups_one_entry(net):
    entries, target = config_list(settings_of(sparsity=0.3, target="params", max_sparsity=0.8, exclude=["conv1"]), *net)
    assert target == "params"
    assert len(entries) == 1
    assert entries[0]["sparse_ratio"] == 0.3
    assert entries[0]["max_sparse_ratio"] == 0.8
    assert "conv1" not in entries[0]["op_names"]
    assert "fc" not in entries[0]["op_names"]


def test_groups_of_channels_are_taken_as_written(net):
    entries, target = config_list(settings_of(groups={"layer1": 0.25, "layer3.0.conv2": 0.75}, target="channels"), *net)
    ratios = {entry["op_names"][0]: entry["sparse_ratio"] for entry in entries}
    assert target == "channels"
    assert ratios["layer1.0.conv1"] == 0.25
    assert ratios["layer3.0.conv2"] == 0.75
    assert ratios["layer3.0.conv1"] == 0.5  # prune.sparsity, where no prefix says otherwise


@pytest.mark.parametrize("target", ["macs", "params"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize(
    "groups", [{"conv1": 0.3, "layer1": 0.9, "layer2": 0.05, "layer3": 0.5}, {"layer3": 0.99}, {"conv1": 0.01}]
)
def test_groups_are_scaled_until_the_budget_is_just_met(net, target, sparsity, round_to, groups):
    model, graph = net
    settings = settings_of(groups=groups, target=target, sparsity=sparsity, round_to=round_to)
    entries, counted = config_list(settings, model, graph)
    assert counted == "channels"
    sizes = {group.name: group.size for group in graph.groups}
    lost = {name: entry["sparse_ratio"] for entry in entries for name in entry["op_names"] if name in sizes}
    kept = {name: round(sizes[name] * (1 - ratio)) for name, ratio in lost.items()}
    budget = (1 - sparsity) * getattr(graph.cost(), target)
    assert getattr(graph.cost(kept), target) <= budget
    assert all(count % round_to == 0 and count > 0 for count in kept.values())
    for name, count in kept.items():  # one step more of any group breaks the budget
        assert getattr(graph.cost({**kept, name: min(count + round_to, sizes[name])}), target) > budget or (
            count == sizes[name]
        )


def test_proportions_are_kept(net):
    model, graph = net
    settings = settings_of(groups={"conv1": 0.2, "layer1": 0.2, "layer2": 0.4, "layer3": 0.4}, sparsity=0.4)
    groups = prunable_groups(settings, model, graph)
    sizes = {group.name: group.size for group in groups}
    kept = fit(settings, graph, sizes, group_ratios(settings, groups))
    shares = {name: 1 - kept[name] / sizes[name] for name in sizes}
    assert shares["layer3.0.conv1"] == pytest.approx(2 * shares["layer1.0.conv1"], abs=0.1)


def test_out_of_reach(net):
    with pytest.raises(
        CompressionError, match=r"prune\.sparsity 0\.9 of macs is out of reach: .* at most 0\.\d+ can go"
    ):
        config_list(settings_of(groups={"layer1": 0.5, "conv1": 0, "layer2": 0, "layer3": 0}, sparsity=0.9), *net)
    with pytest.raises(CompressionError, match="remove no unit"):
        config_list(settings_of(groups={"layer1": 0.0}, sparsity=0, target="channels"), *net)


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"groups": {"layer4": 0.5}}, "prune.groups.layer4 is the beginning of no prunable group; closest: layer"),
        ({"groups": {"layer": 0.5}}, "prune.groups.layer is the beginning of no prunable group"),
        ({"groups": {"fc": 0.5}}, "prune.groups.fc is the beginning of no prunable group"),
        ({"op_types": ["Conv2D"]}, "prune.op_types: the model has no Conv2D; closest: Conv2d"),
        (
            {"op_names": ["layer1.0.conv9"]},
            "prune.op_names: the model has no module layer1.0.conv9; closest: layer1.0.conv",
        ),
        ({"exclude": ["x"]}, "prune.exclude: the model has no module x; known: conv1"),
    ],
)
def test_names_that_match_nothing(net, prune, message):
    with pytest.raises(RecipeError) as caught:
        config_list(settings_of(**prune), *net)
    assert message in str(caught.value)


def test_nothing_left_to_prune(net):
    with pytest.raises(CompressionError, match="nothing that it selects can be pruned"):
        config_list(settings_of(op_types=["Linear"]), *net)

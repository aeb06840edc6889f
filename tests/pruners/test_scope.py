import logging

import pytest
import torch
from torch import nn

from nni_plugins.channels import ChannelGraph
from nni_plugins.pruners import MagnitudePruner, PruningError
from nni_plugins.pruners.scope import make_pools, neighbourhoods, resolve

from .nets import X, make


def resolved(name, config_list, **kwargs):
    net = make(name)
    return resolve(net, config_list, ChannelGraph.watch(net, X), **kwargs)


def names(result):
    return [claim.group.name for claim in result.claims]


def test_a_type_selects_the_groups_that_it_produces():
    assert names(resolved("plain", [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])) == ["conv1", "conv2", "conv3"]
    assert names(resolved("plain", [{"op_types": ["Linear"], "sparse_ratio": 0.5}])) == ["fc1"]  # fc2 is the output


def test_one_producer_takes_its_whole_group_along():
    assert names(resolved("residual", [{"op_names": ["b2"], "sparse_ratio": 0.5}])) == ["stem"]


def test_an_excluded_producer_protects_its_whole_group():
    entry = {"op_types": ["Conv2d"], "exclude_op_names": ["b2"], "sparse_ratio": 0.5}
    assert names(resolved("residual", [entry])) == ["a1", "b1"]
    by_expression = {"op_types": ["Conv2d"], "exclude_op_names_re": [r"[ab]\d"], "sparse_ratio": 0.5}
    with pytest.raises(PruningError, match=r"stem: a2 is excluded, and goes with it"):
        resolved("residual", [by_expression])


def test_an_excluded_consumer_protects_nothing():
    entry = {"op_types": ["Conv2d"], "exclude_op_names": ["fc1"], "sparse_ratio": 0.5}
    assert "conv3" in names(resolved("plain", [entry]))


def test_excluded_here_and_selected_there_is_selected():
    first = {"op_types": ["Conv2d"], "exclude_op_names": ["b1"], "sparse_ratio": 0.5}
    second = {"op_names": ["b1"], "sparse_ratio": 0.25}
    result = resolved("residual", [first, second])
    assert {claim.group.name: claim.entry for claim in result.claims} == {"stem": 0, "a1": 0, "b1": 1}


def test_the_first_entry_wins_and_a_group_goes_with_its_first_producer():
    config = [{"op_names": ["stem"], "sparse_ratio": 0.25}, {"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    result = resolved("residual", config)
    assert {claim.group.name: claim.entry for claim in result.claims} == {"stem": 0, "a1": 1, "b1": 1}
    assert result.selected[1] == {"a1", "a2", "b1", "b2"}


def test_another_type_in_the_same_group_goes_along():
    """The linear layers of squeeze-and-excitation gate the convolution's channels."""
    result = resolved("squeeze", [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    group = result.claims[0].group
    assert group.name == "conv1"
    assert {"conv1", "up"} <= {member.module for member in group.members if member.role == "out"}


def test_norms_select_where_no_producer_does():
    result = resolved("plain", [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}])
    assert {claim.group.name: claim.module for claim in result.claims} == {"conv1": "bn1", "conv3": "bn3"}


def test_in_channel_selects_what_a_module_consumes():
    result = resolved("plain", [{"op_names": ["conv2"], "sparse_ratio": 0.5, "granularity": "in_channel"}])
    assert names(result) == ["conv1"]


def test_nested_and_legacy_settings():
    net = make("plain")
    graph = ChannelGraph.watch(net, X)
    entry = {"op_names": ["conv2"], "target_settings": {"weight": {"sparse_ratio": 0.5, "max_sparse_ratio": 0.6}}}
    result = resolve(net, [entry], graph)
    assert result.settings[0] == {"sparse_ratio": 0.5, "max_sparse_ratio": 0.6}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"op_types": ["Conv3d"], "sparse_ratio": 0.5}, "no module has these types and names"),
        ({"op_names": ["fc2"], "sparse_ratio": 0.5}, "fc2: the model's output"),
        ({"op_types": ["Conv2d"]}, "neither sparse_ratio nor sparse_threshold"),
        ({"op_types": ["Conv2d"], "sparse_ratio": 1.0}, "sparse_ratio is 1.0; it must be in"),
        ({"op_types": ["Conv2d"], "sparse_ratio": 0.5, "granularity": [1, 4]}, "this pruner removes whole channels"),
    ],
)
def test_errors_name_the_entry(entry, message):
    with pytest.raises(PruningError, match=message) as caught:
        resolved("plain", [entry])
    assert str(caught.value).startswith("config_list[0]")
    assert "\n" not in str(caught.value)


def test_inexact_groups_are_left_out_until_asked_for():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    graph = ChannelGraph.watch(net, X)
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    assert names(resolve(net, config, graph)) == ["3"]
    assert "0" in names(resolve(net, config, graph, exact_only=False))


def pools(result, **kwargs):
    current = {claim.group.name: result.settings[claim.entry] for claim in result.claims}
    return make_pools(result, current, scope=kwargs.get("scope", "local"), classes={})


def test_one_budget_counts_the_whole_model_and_several_count_their_own():
    one = pools(resolved("plain", [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]))
    assert [pool.modules for pool in one] == [None]
    two = pools(
        resolved(
            "plain", [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}, {"op_types": ["Linear"], "sparse_ratio": 0.2}]
        )
    )
    assert [(pool.sparsity, pool.modules) for pool in two] == [
        (0.5, frozenset({"conv1", "conv2", "conv3"})),
        (0.2, frozenset({"fc1", "fc2"})),
    ]


def test_global_group_id_joins_entries_and_ranks_globally():
    config = [
        {"op_types": ["Conv2d"], "sparse_ratio": 0.5, "global_group_id": "g", "max_sparse_ratio": 0.8},
        {"op_types": ["Linear"], "sparse_ratio": 0.5, "global_group_id": "g"},
    ]
    (pool,) = pools(resolved("plain", config))
    assert pool.scope == "global"
    assert pool.groups == ("conv1", "conv2", "conv3", "fc1")
    assert pool.bounds["conv1"] == (0.0, 0.8)
    assert pool.bounds["fc1"] == (0.0, 1.0)
    config[1]["sparse_ratio"] = 0.4
    with pytest.raises(PruningError, match="global_group_id g: its entries ask for different sparsities"):
        pools(resolved("plain", config))


def test_neighbourhoods_do_not_depend_on_width():
    net = make("residual")
    classes = neighbourhoods(net, ChannelGraph.watch(net, X))
    assert classes["a1"] == classes["b1"]
    assert classes["a1"] != classes["stem"]


@pytest.mark.parametrize(
    ("name", "hint"), [("module.b2", "; did you mean 'b2'?"), ("b22", "; did you mean 'b2'?"), ("zzzz", "")]
)
def test_an_exclusion_that_names_nothing_is_said(caplog, name, hint):
    entry = {"op_types": ["Conv2d"], "exclude_op_names": [name], "sparse_ratio": 0.5}
    with caplog.at_level(logging.WARNING):
        assert names(resolved("residual", [entry])) == ["stem", "a1", "b1"]
    said = f"config_list[0].exclude_op_names: the model has no module {name!r}, so it excludes nothing{hint}"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_an_entry_that_comes_too_late_says_so():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    asked = [{"op_types": ["Conv2d"], "sparse_ratio": ratio} for ratio in (0.3, 0.5)]
    with pytest.raises(PruningError, match=r"config_list\[1\]: all that it selects is selected by an earlier entry"):
        MagnitudePruner(model, asked, dummy_input=torch.rand(1, 1, 8, 8))

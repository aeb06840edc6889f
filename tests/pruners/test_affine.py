"""Learnt corrections of scores (LeGR)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nni_plugins.pruners import MagnitudePruner
from nni_plugins.pruners.affine import affine_by_group, transformed
from nni_plugins.pruners.errors import PruningError


def _pruned(affine, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 2)
    )
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.4}]
    pruner = MagnitudePruner(
        model, config, dummy_input=torch.randn(1, 3, 8, 8), scope="global", affine=affine, **kwargs
    )
    pruner.compress()
    return {group.name: len(pruner.plan.kept.get(group.name, range(8))) for group in pruner.groups}


def test_the_identity_changes_nothing():
    assert _pruned(None) == _pruned({"0": (1.0, 0.0), "2": (1.0, 0.0), "4": (1.0, 0.0)})


@pytest.mark.parametrize("pair", [(100.0, 0.0), (1.0, 100.0)])
def test_a_group_that_is_raised_keeps_all(pair):
    kept = _pruned({"2": pair})
    assert kept["2"] == 8
    assert sum(kept.values()) == sum(_pruned(None).values())


def test_a_group_that_is_lowered_goes_first_but_not_whole():
    assert _pruned({"2": (1.0, -100.0)})["2"] == 1


def test_the_longest_prefix_counts():
    found = affine_by_group({"a": (2, 0), "a.b": (3, 1)}, ["a.b.conv", "a.c", "ab.c"])
    assert found == {"a.b.conv": (3.0, 1.0), "a.c": (2.0, 0.0)}


@pytest.mark.parametrize("affine", [{"layer9": (1.0, 0.0)}, {"a": (1.0,)}, {"a": (float("nan"), 0.0)}])
def test_what_does_not_fit_is_one_line(affine):
    with pytest.raises(PruningError) as error:
        affine_by_group(affine, ["a.b"])
    assert "\n" not in str(error.value)


def test_shifts_count_in_means_of_live_units():
    scores = {"a": np.array([1.0, 3.0]), "b": np.array([2.0, 100.0])}
    result = transformed(scores, {"b": np.array([False, True])}, {"a": (2.0, 1.0)})
    assert result["a"].tolist() == [4.0, 8.0]
    assert result["b"].tolist() == [2.0, 100.0]

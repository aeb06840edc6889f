"""A replay is clean where the forward follows the shapes, and names the first operator that does not."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.channels.replay import Replay
from nni_plugins.speedup.compact import Compaction
from tests.random_networks import RandomCNN

X = torch.randn(2, 3, 8, 8)


def plan_of(model, x, units=None):
    graph = ChannelGraph.watch(model, x)
    return Plan(graph, units or {g.name: range((g.size + 1) // 2) for g in graph.groups if g.prunable and g.exact})


@pytest.mark.parametrize("seed", range(10))
def test_the_unpruned_and_the_pruned_replay_are_clean(seed):
    model = RandomCNN(seed)
    empty = Plan(ChannelGraph.watch(model, X), {})
    assert Replay(empty, X).run(model) is None
    plan = plan_of(model, X)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compaction = Compaction(model, plan)
    compaction.apply()
    assert Replay(plan, X).run(model) is None
    assert Replay(empty, X).run(model) is not None
    compaction.undo()
    assert Replay(empty, X).run(model) is None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Stale(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.tail = nn.Linear(6, 2)

    def forward(self, x):
        return self.tail(self.inner(x).view(-1, 2, 3).flatten(1))


def test_a_mismatch_says_where():
    model, x = Stale(), torch.randn(2, 4)
    graph = ChannelGraph.watch(model, x, rehearse=False)
    mismatch = Replay(Plan(graph, {"inner.0": range(2)}), x).run(model)
    assert mismatch.operator.name == "aten.view"
    assert mismatch.module == ""
    assert "aten.view in the model" in str(mismatch)


class Forks(nn.Module):
    """Runs another operator when it is narrow."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.a(x)
        return self.b(F.relu(x) if x.shape[1] > 3 else torch.sigmoid(x))


def test_another_operator_is_a_mismatch():
    model, x = Forks(), torch.randn(2, 4)
    mismatch = Replay(plan_of(model, x), x).run(model)
    assert (mismatch.operator.name, mismatch.why) == ("aten.relu", "the compact model runs aten.sigmoid here")


def test_predicted_shapes_count_kept_labels():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8 * 64, 2)), X
    plan = plan_of(model, x, {"0": [1, 4, 6]})
    replay = Replay(plan, x)
    shapes = [replay.predicted(op.outputs[0]) for op in plan.graph.trace.operators]
    assert (2, 3, 8, 8) in shapes
    assert (2, 3 * 64) in shapes
    assert np.array_equal(plan.dimensions("2.weight")[1], np.concatenate([np.arange(64) + 64 * c for c in (1, 4, 6)]))


class ByEinsum(nn.Module):
    """Torch takes another way through einsum, and through a linear layer of several dimensions, where a size is 1."""

    def __init__(self, bias):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 3 * 12), nn.Linear(12, 6, bias=bias)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, 3, -1) for y in self.qkv(x).chunk(3, dim=-1))
        weights = (torch.einsum("bihd,bjhd->bhij", q, k) / 2).softmax(-1)
        return x + self.out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


@pytest.mark.parametrize("bias", [False, True])
def test_a_size_of_one_goes_another_way_to_the_same(bias):
    model, x = ByEinsum(bias), torch.randn(2, 5, 6)
    graph = ChannelGraph.watch(model, x, units="head_dim")
    group = next(g for g in graph.groups if g.prunable and g.exact)
    assert (group.kind, group.size) == ("head_dim", 4)
    assert Replay(Plan(graph, {group.name: [1]}), x).run(model) is None


class Turned(nn.Module):
    """A size that is written down where dimensions are cut is still found, though views may differ."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        y = self.a(x).view(-1, 2, 4).transpose(1, 2)
        return self.b(y.reshape(-1, 8))


def test_a_fixed_size_is_found_among_views():
    graph = ChannelGraph.watch(Turned(), torch.randn(3, 4), rehearse=False)
    group = next(g for g in graph.groups if g.prunable)
    plan = Plan(graph, {group.name: [0]})
    mismatch = Replay(plan, torch.randn(3, 4)).run(Turned())
    assert mismatch is not None
    assert mismatch.operator.name == "aten.view"

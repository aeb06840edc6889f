"""Rehearsals of forwards that look at values: they go the watched way, and their number is limited."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nni_plugins.channels import ChannelGraph, Plan, rehearse
from nni_plugins.channels.replay import Replay
from nni_plugins.speedup import ModelSpeedup


def prunable(graph):
    return [g.name for g in graph.groups if g.prunable and g.exact]


class Zoom(nn.Module):
    """Makes its picture as large as the largest score is (as Keypoint R-CNN does with each box)."""

    def __init__(self):
        super().__init__()
        self.body, self.score = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 1, 1)
        self.hidden, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = F.relu(self.body(x))
        size = 4 + int((100 * self.score(x).abs()).max().ceil())
        return self.head(F.relu(self.hidden(F.interpolate(x, size=(size, size)))))


def test_a_size_that_follows_a_value_freezes_nothing(monkeypatch):
    torch.manual_seed(0)
    model, x = Zoom(), torch.randn(1, 3, 8, 8)
    runs, run = [], Replay.run
    monkeypatch.setattr(Replay, "run", lambda self, model, *until: runs.append(1) or run(self, model, *until))
    graph = ChannelGraph.watch(model, x)
    assert graph.trace.data == "real"
    assert prunable(graph) == ["body", "hidden"]
    assert len(runs) == 1
    graph.trace.numbers.clear()  # so that the replay goes by its own values
    assert "upsample" in str(Replay(Plan(graph, {"body": range(4)}), x).run(model))


def test_a_rehearsal_works_out_no_products(monkeypatch):
    torch.manual_seed(0)
    model, x = Zoom(), torch.randn(1, 3, 8, 8)
    graph = ChannelGraph.watch(model, x)
    seen = []
    model.hidden.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    assert Replay(Plan(graph, {"hidden": range(4)}), x).run(model) is None
    assert seen[0].shape[1] == 4
    assert not seen[0].any()


class Scaled(nn.Module):
    """Divides by the root of a width that it writes into a tensor (as RAFT does)."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(1, 2)
        self.other, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        score = (a * b).sum(-1, keepdim=True) / torch.sqrt(torch.tensor(a.shape[-1]))
        return self.out(score) + self.last(F.relu(self.other(x)))


def test_a_scale_that_a_forward_writes_into_a_tensor_keeps_the_width():
    graph = ChannelGraph.watch(Scaled(), torch.randn(5, 4))
    assert prunable(graph) == ["other"]
    assert [(f.operator, f.reason, f.size) for f in graph.frozen if f.operator == "aten.sqrt"] == [
        ("aten.sqrt", rehearse.SCALED, 6)
    ]


class Found(nn.Module):
    """Norms what it finds; where that is nothing, torch computes a batch norm by operators that read no statistics."""

    def __init__(self):
        super().__init__()
        self.hidden, self.norm, self.head = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 2)

    def forward(self, x):
        found = x[torch.nonzero(x.mean((1, 2, 3)) > 0).flatten()]
        return self.head(F.relu(self.norm(self.hidden(found))).mean((2, 3)))


def test_a_norm_of_nothing_loses_its_statistics_too():
    model, nothing = Found(), torch.rand(4, 3, 4, 4) - 2
    model.norm.running_mean.copy_(torch.randn(8))
    model.norm.weight.data.copy_(torch.randn(8))
    graph = ChannelGraph.watch(model, nothing)
    assert prunable(graph) == ["hidden"]
    masks = Plan(graph, {"hidden": [1, 4, 7]}).masks(model)
    something = torch.rand(4, 3, 4, 4)
    with torch.no_grad():
        masked = Found().eval()
        masked.load_state_dict(model.state_dict())
        for name, targets in masks.items():
            for target, mask in targets.items():
                getattr(masked.get_submodule(name), target).mul_(mask)
        expected = masked(something)
        compact = ModelSpeedup(model, nothing, masks).speedup_model().eval()
        assert compact.norm.running_mean.shape == (3,)
        torch.testing.assert_close(compact(something), expected)


class Stubborn(nn.Module):
    """Runs another operator where it has not as many parameters as it was written for."""

    def __init__(self, depth, real):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(depth)])
        self.first, self.head, self.real = nn.Linear(3, 8), nn.Linear(8, 2), real
        self.count = self.counted()

    def counted(self):
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, x):
        if self.real and x.sum() > 1e9:
            return x
        x = self.first(x) if self.counted() == self.count else torch.tanh(self.first(x))
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.head(x)


@pytest.mark.parametrize("real", [False, True])
def test_a_forward_that_fails_with_every_group_is_given_up_soon(real, monkeypatch):
    runs, run = [], Replay.run
    monkeypatch.setattr(Replay, "run", lambda self, model, *until: runs.append(1) or run(self, model, *until))
    graph = ChannelGraph.watch(Stubborn(30, real), torch.randn(2, 3))
    assert prunable(graph) == []
    assert len(runs) <= (61 if real else 150)  # one by one, it were 31 times 6
    for group in graph.groups:
        if group.name.startswith("layers"):
            assert rehearse.FIXED in group.reason or rehearse.LIMITED in group.reason


class PartlyStubborn(Stubborn):
    """Runs other operators in some layers where these have other sizes than they were made with."""

    def __init__(self, depth, stubborn):
        super().__init__(depth, real=True)
        self.stubborn = stubborn

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        x = self.first(x)
        for place, layer in enumerate(self.layers):
            other = place in self.stubborn and layer.weight.shape != (8, 8)
            x = F.relu(layer(x)) if not other else torch.tanh(layer(x))
        return self.head(x)


def test_what_is_known_to_run_when_no_more_is_tried_can_go(monkeypatch):
    monkeypatch.setitem(rehearse._MOST_RUNS, "real", 12)
    graph = ChannelGraph.watch(PartlyStubborn(16, [3, 4, 12]), torch.randn(2, 3))
    free = [f"layers.{i}" for i in range(16) if not {i, i + 1} & {3, 4, 12}]
    found = prunable(graph)
    assert set(found) <= {"first", *free}
    assert len(found) >= 5
    assert (
        Replay(rehearse.trial_plan(graph, inexact=False), torch.randn(2, 3)).run(PartlyStubborn(16, [3, 4, 12])) is None
    )


def test_what_is_not_known_to_run_when_no_more_is_tried_stays(monkeypatch, caplog):
    monkeypatch.setitem(rehearse._MOST_RUNS, "real", 5)
    graph = ChannelGraph.watch(Stubborn(20, real=True), torch.randn(2, 3))
    assert prunable(graph) == []
    assert all(rehearse.LIMITED in g.reason for g in graph.groups if g.name.startswith("layers"))
    assert rehearse.LIMITED in caplog.text

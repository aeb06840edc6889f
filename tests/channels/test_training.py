"""Parameters that only training uses go along with the channels that they read."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.channels.replay import Replay
from nni_plugins.speedup import ModelSpeedup
from nni_plugins.speedup.verify import largest_error, outputs_of


class _Auxiliary(nn.Module):
    """A trunk of two convolutions, and a head on the first that runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(12, 5)
        self.aux = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Conv2d(8, 6, 2), nn.BatchNorm2d(6), nn.Flatten())
        self.aux_wide = nn.Linear(8 * 4 * 4, 5)
        self.aux_head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.first(x)
        y = self.head(self.second(x).mean((2, 3)))
        if not self.training:
            return y
        wide = self.aux_wide(nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))
        return y, self.aux_head(self.aux(x)), wide


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _compact(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, nn.Module]:
    graph = ChannelGraph.watch(model, x)
    masks = Plan(graph, {g.name: range(1, g.size) for g in graph.groups if g.prunable and g.exact}).masks(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for module, targets in masks.items():
            for target, mask in targets.items():
                twin.get_submodule(module).get_parameter(target).mul_(mask)
    return ModelSpeedup(model, x, masks).speedup_model(), twin


def test_a_head_that_only_training_runs_fits_the_trunk_that_shrank(x):
    torch.manual_seed(0)
    compact, masked = _compact(_Auxiliary(), x)
    assert compact.first[0].out_channels == 7
    assert compact.aux[1].weight.shape == (6, 7, 2, 2)
    assert compact.aux[1].in_channels == 7
    assert compact.aux_wide.weight.shape == (5, 7 * 16)
    assert compact.aux_wide.in_features == 7 * 16
    assert largest_error(outputs_of(compact, x), outputs_of(masked, x))[1] < 1e-5
    batch = torch.cat([x, x + 1])
    ours, theirs = compact.train()(batch), masked.train()(batch)
    assert largest_error(list(ours), list(theirs))[1] < 1e-5, "the auxiliary outputs are the masked model's"
    sum(y.square().mean() for y in ours).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in compact.parameters())


def test_what_only_training_reads_stays_and_says_so(x):
    graph = ChannelGraph.watch(_Auxiliary(), x)
    inside = next(g for g in graph.groups if g.name == "aux.1")
    assert not inside.prunable
    assert "training" in inside.reason
    assert not any("not used" in frozen.reason for frozen in graph.frozen)


def test_what_training_returns_freezes_what_it_is_tied_to(x):
    class Shown(_Auxiliary):
        def forward(self, x):
            y = self.second(self.first(x))
            out = self.head(y.mean((2, 3)))
            return (out, y + self.scale) if self.training else out

    model = Shown()
    model.scale = nn.Parameter(torch.ones(12, 1, 1))
    graph = ChannelGraph.watch(model, x)
    assert not graph.group("second.0").prunable, "in training its channels are an output"
    assert graph.group("first.0").prunable


def test_a_model_that_cannot_train_on_this_input_is_watched_as_before(x):
    class Wants(_Auxiliary):
        def forward(self, x, target=None):
            if self.training and target is None:
                raise ValueError("targets are needed in training")
            return self.head(self.second(self.first(x)).mean((2, 3)))

    graph = ChannelGraph.watch(Wants(), x)
    assert graph.group("first.0").prunable
    assert any("not used" in frozen.reason for frozen in graph.frozen)


def test_training_is_watched_only_where_parameters_are_unused_and_leaves_no_trace(x):
    runs = []

    class Counted(_Auxiliary):
        def forward(self, x):
            runs.append(self.training)
            return super().forward(x)

    model = Counted().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graph = ChannelGraph.watch(model, x, rehearse=False)
    assert True in runs
    assert not model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    plan = Plan(graph, {"first.0": range(2, 8)})
    assert Replay(plan, x).run(model) is None
    runs.clear()
    ChannelGraph.watch(nn.Sequential(model.first, model.second), x, rehearse=False)
    assert runs == []

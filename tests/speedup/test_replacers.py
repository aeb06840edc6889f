"""NNI's own ModelSpeedup with our replacers: the same shapes and outputs as ours."""

import copy
import logging

import pytest
import torch
from nni.compression.speedup import ModelSpeedup as StockSpeedup
from torch import nn

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.speedup import REPLACERS, ModelSpeedup
from tests.random_networks import trained_like


def net(dims, groups=1):
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    up = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
    instance = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dims]
    pool = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[dims]
    mean = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dims]
    model = nn.Sequential(
        conv(3, 8, 3, padding=1), norm(8), nn.ReLU(), pool(2), conv(8, 8, 3, padding=1, groups=groups),
        instance(8, affine=True, track_running_stats=True), nn.ReLU(), up(8, 6, 2, stride=2), norm(6), nn.ReLU(),
        mean(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    trained_like(model)
    return model.eval()


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("groups", [1, 8])
def test_stock_with_our_replacers_equals_ours(dims, groups):
    model = net(dims, groups)
    x = torch.randn(2, 3, *[4] * dims)
    graph = ChannelGraph.watch(model, x)
    plan = Plan(graph, {g.name: range(0, g.size, 2) for g in graph.groups if g.prunable})
    masks = plan.masks(model)
    ours = ModelSpeedup(copy.deepcopy(model), x, masks).speedup_model()
    with torch.no_grad():
        for name, targets in masks.items():
            for target, mask in targets.items():
                getattr(model.get_submodule(name), target).mul_(mask)
    quiet = logging.getLogger("quiet")
    quiet.setLevel(logging.CRITICAL)
    theirs = StockSpeedup(model, x, masks, customized_replacers=list(REPLACERS), logger=quiet).speedup_model().eval()
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)


def test_the_list_that_nni_appends_to_is_a_copy():
    import nni_plugins.speedup as speedup

    speedup.REPLACERS.append("something")
    assert "something" not in speedup.REPLACERS

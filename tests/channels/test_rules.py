"""One row an operator: what a unit of the first convolution reaches through it, or what freezes it.

Each body is put between a producer (8 channels) and, where it keeps them, a consumer; the expected number is how many units
the producer's group has when everything can go, or the reason where nothing can.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.speedup import ModelSpeedup


class Between(nn.Module):
    def __init__(self, body, width=8, dims=2):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.first = conv(3, 8, 1)
        self.body = body
        self.last = conv(width, 5, 1)

    def forward(self, x):
        return self.last(self.body(self.first(x)))


class Call(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def grouped(groups, out=8, kernel=3):
    return nn.Conv2d(8, out, kernel, padding=kernel // 2, groups=groups)


#: name -> (body, channels after it, units of the producer's group)
ROWS = {
    "relu": (nn.ReLU(), 8, 8),
    "inplace relu": (nn.ReLU(inplace=True), 8, 8),
    "gelu": (nn.GELU(), 8, 8),
    "silu": (nn.SiLU(), 8, 8),
    "hardswish": (nn.Hardswish(), 8, 8),
    "hardsigmoid": (nn.Hardsigmoid(), 8, 8),
    "relu6": (nn.ReLU6(), 8, 8),
    "elu": (nn.ELU(), 8, 8),
    "softplus": (nn.Softplus(), 8, 8),
    "mish": (nn.Mish(), 8, 8),
    "dropout": (nn.Dropout(0.5), 8, 8),
    "an operator of numbers alone": (Call(lambda self, x: x / torch.div(16, 4, rounding_mode="trunc")), 8, 8),
    "filled with a tensor": (Call(lambda self, x: x + torch.empty(1).fill_(torch.tensor(2.0))), 8, 8),
    "prelu, one a channel": (nn.PReLU(8), 8, 8),
    "prelu, one for all": (nn.PReLU(), 8, 8),
    "batch norm": (nn.BatchNorm2d(8), 8, 8),
    "batch norm without affine": (nn.BatchNorm2d(8, affine=False), 8, 8),
    "batch norm without statistics": (nn.BatchNorm2d(8, track_running_stats=False), 8, 8),
    "instance norm": (nn.InstanceNorm2d(8, affine=True), 8, 8),
    "instance norm with statistics": (nn.InstanceNorm2d(8, affine=True, track_running_stats=True), 8, 8),
    "group norm, whole groups go": (nn.GroupNorm(4, 8), 8, 4),
    "max pool": (nn.MaxPool2d(2), 8, 8),
    "avg pool": (nn.AvgPool2d(2, padding=1), 8, 8),
    "adaptive pool": (nn.AdaptiveAvgPool2d(2), 8, 8),
    "adaptive max pool": (nn.AdaptiveMaxPool2d(2), 8, 8),
    "upsample nearest": (nn.Upsample(scale_factor=2), 8, 8),
    "upsample bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), 8, 8),
    "reflection pad": (nn.ReflectionPad2d(1), 8, 8),
    "zero pad": (nn.ZeroPad2d(1), 8, 8),
    "depthwise": (grouped(8), 8, 8),
    "depthwise, two each": (grouped(8, 16), 16, 8),
    "grouped by two": (grouped(2), 8, 4),
    "grouped by four": (grouped(4), 8, 4),
    "transposed": (nn.ConvTranspose2d(8, 6, 2, stride=2), 6, 8),
    "transposed, grouped": (nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), 6, 4),
    "transposed, depthwise": (nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8), 8, 8),
    "residual": (Call(lambda m, x: x + m.conv(x), conv=nn.Conv2d(8, 8, 3, padding=1)), 8, 8),
    "times a gate": (Call(lambda m, x: x * torch.sigmoid(m.conv(x)), conv=nn.Conv2d(8, 8, 1)), 8, 8),
    "times a gate of one channel": (Call(lambda m, x: x * torch.sigmoid(m.conv(x)), conv=nn.Conv2d(8, 1, 1)), 8, 8),
    "squeeze and excite": (
        Call(
            lambda m, x: x * torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True))))),
            down=nn.Conv2d(8, 4, 1),
            up=nn.Conv2d(4, 8, 1),
        ),
        8,
        8,
    ),
    "concatenated with itself": (Call(lambda m, x: torch.cat([x, F.relu(x)], 1)), 16, 8),
    "glu": (nn.GLU(1), 4, 4),
    "chunk and swap": (Call(lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1)), 8, 4),
    "split by hand and add": (Call(lambda m, x: x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :]), 4, 4),
    "channel shuffle": (nn.ChannelShuffle(2), 8, 4),
    "shuffle by views": (
        Call(lambda m, x: x.view(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2)),
        8,
        4,
    ),
    "pixel shuffle": (nn.PixelShuffle(2), 2, 2),
    "pixel unshuffle": (nn.PixelUnshuffle(2), 32, 8),
    "channels last and back": (Call(lambda m, x: m.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), linear=nn.Linear(8, 6)), 6, 8),
    "scale by a bare parameter": (Call(lambda m, x: x * m.scale, scale=nn.Parameter(torch.rand(1, 8, 1, 1))), 8, 8),
    "shift by a bare parameter": (Call(lambda m, x: x + m.shift, shift=nn.Parameter(torch.rand(8, 1, 1))), 8, 8),
    "expand": (Call(lambda m, x: x + x.mean(1, keepdim=True).expand_as(x) * 0), 8, None),
    "where": (Call(lambda m, x: torch.where(x > 0, x, torch.zeros_like(x))), 8, 8),
    "clamp": (Call(lambda m, x: x.clamp(-1, 1)), 8, 8),
    "square root of a square": (Call(lambda m, x: (x * x + 0.1).sqrt()), 8, 8),
    "sum over positions": (Call(lambda m, x: x.sum((2, 3), keepdim=True)), 8, 8),
    "max over positions": (Call(lambda m, x: x.amax((2, 3), keepdim=True)), 8, 8),
    "stack and sum": (Call(lambda m, x: torch.stack([x, x.relu()]).sum(0)), 8, 8),
    "einsum": (Call(lambda m, x: torch.einsum("nchw,oc->nohw", x, m.weight), weight=nn.Parameter(torch.randn(6, 8))), 6, 8),
    "roll over positions": (Call(lambda m, x: x.roll(1, 2)), 8, 8),
    "flip over positions": (Call(lambda m, x: x.flip(3)), 8, 8),
    "copied into zeros": (Call(lambda m, x: torch.zeros_like(x).copy_(x)), 8, 8),
    "softmax over positions": (Call(lambda m, x: x.flatten(2).softmax(2).view_as(x)), 8, 8),
    "layer norm over channels": (Call(lambda m, x: F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)), 8, None),
    "group norm, one group": (nn.GroupNorm(1, 8), 8, None),
    "softmax over channels": (nn.Softmax(1), 8, None),
    "mean over channels": (Call(lambda m, x: x - x.mean(1, keepdim=True)), 8, None),
    "one channel by its number": (Call(lambda m, x: x + x[:, 3:4]), 8, None),
    "sorted": (Call(lambda m, x: x.sort(dim=1).values), 8, None),
    "picked by index": (Call(lambda m, x: x[:, [1, 0, 2, 3, 4, 5, 6, 7]]), 8, None),
    "convolution along channels": (Call(lambda m, x: x * m.conv(x.mean((2, 3))[:, None]).transpose(1, 2)[..., None], conv=nn.Conv1d(1, 1, 3, padding=1)), 8, None),
    "no rule": (Call(lambda m, x: torch.geqrf(x).a), 8, None),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_row(name):
    body, width, units = ROWS[name]
    if isinstance(body, nn.Module):
        body = _fresh(body)
    model = Between(body, width).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    graph = ChannelGraph.watch(model, x)
    group = next(g for g in graph.groups if any(m.name == "first.weight" and m.dim == 0 for m in g.members))
    if units is None:
        assert not (group.prunable and group.exact)
        assert group.reason
        return
    assert group.prunable, group.reason
    assert group.exact, group.reason
    assert group.size == units
    plan = Plan(graph, {g.name: range(1, g.size) for g in graph.groups if g.prunable and g.exact})
    speedup = ModelSpeedup(model, x, plan.masks(model))
    speedup.speedup_model()
    assert not speedup.report.put_back
    assert speedup.report.relative_error < 1e-10
    assert speedup.plan.counts == plan.counts
    assert model.first.weight.shape[0] == 8 - 8 // units


def _fresh(module):
    import copy

    return copy.deepcopy(module)


@pytest.mark.parametrize("dims", [1, 3])
def test_one_and_three_dimensions(dims):
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    up = {1: nn.ConvTranspose1d, 3: nn.ConvTranspose3d}[dims]
    norm = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[dims]
    pool = {1: nn.MaxPool1d, 3: nn.MaxPool3d}[dims]
    body = nn.Sequential(conv(8, 8, 3, padding=1, groups=8), norm(8), nn.ReLU(), up(8, 6, 2, stride=2), pool(2))
    model = Between(body, 6, dims).double()
    x = torch.randn(2, 3, *[4] * dims, dtype=torch.float64)
    graph = ChannelGraph.watch(model, x)
    plan = Plan(graph, {g.name: range(g.size // 2) for g in graph.groups if g.prunable})
    assert sorted(len(k) for k in plan.kept.values()) == [3, 4]
    speedup = ModelSpeedup(model, x, plan.masks(model))
    speedup.speedup_model()
    assert speedup.report.relative_error < 1e-10
    assert model.first.weight.shape[0] == 4

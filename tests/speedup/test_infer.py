"""What masks leave without effect: a constant is one only if nothing that depends on the input has touched it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.speedup import ModelSpeedup
from tests.random_networks import trained_like

X = torch.randn(2, 3, 6, 6)


class Net(nn.Module):
    """A masked convolution whose norm is not masked, what ``between`` does to it, and a consumer."""

    def __init__(self, between, consumer=None):
        super().__init__()
        self.between = between
        self.a, self.an, self.gate = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(3, 1, 1)
        self.b, self.c = nn.Conv2d(8, 4, 1) if consumer is None else consumer(), nn.Conv2d(3, 4, 1)
        trained_like(self)

    def forward(self, x):
        return self.b(self.between(self.an(self.a(x)), torch.sigmoid(self.gate(x)))) + self.c(x)


def check(model, masks, x=X, **arguments):
    """Speed up; return the report, and the error against the masked model, worked out here."""
    masked = copy.deepcopy(model).eval()
    for module, targets in masks.items():
        for target, mask in targets.items():
            getattr(masked.get_submodule(module), target).data.mul_(mask)
    speedup = ModelSpeedup(model, x, masks, **arguments)
    compact = speedup.speedup_model().eval()
    outputs = []
    for net in (compact, masked):
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(net(x))
    return speedup, (outputs[0] - outputs[1]).abs().max().item()


def producer_masks():
    mask = torch.ones(8, 3, 1, 1)
    mask[[1, 4, 5]] = 0
    return {"a": {"weight": mask, "bias": mask[:, 0, 0, 0]}}


@pytest.mark.parametrize(
    "between",
    [
        lambda y, gate: y * gate,
        lambda y, gate: y + gate,
        lambda y, gate: y + torch.randn(2, 1, 6, 6),
        lambda y, gate: torch.where(gate > 0.5, y, -y),
        lambda y, gate: torch.maximum(y, gate),
    ],
)
def test_a_constant_that_meets_a_broadcast_map_is_none(between):
    """A spatial gate makes of what masking left behind a map that depends on the input."""
    speedup, error = check(Net(between), producer_masks())
    assert not speedup.plan.kept
    assert not speedup.report.put_back
    assert not speedup.report.inexact
    assert error < 1e-5


def test_a_constant_that_meets_none_goes():
    speedup, error = check(Net(lambda y, gate: F.relu(y) * 2 + 1), producer_masks())
    assert speedup.plan.counts == {"a": 5}
    assert error < 1e-5


def test_what_a_zero_is_multiplied_with_does_not_matter():
    masks = producer_masks()
    masks["an"] = {"weight": masks["a"]["bias"], "bias": masks["a"]["bias"]}
    speedup, error = check(Net(lambda y, gate: y * gate), masks)
    assert speedup.plan.counts == {"a": 5}
    assert error < 1e-5


class Learned(nn.Module):
    """A learned constant goes through layers of its own: a style network's input, prompts, queries."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 6, 6, 6))
        self.b, self.c, self.a, self.d = nn.Conv2d(6, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.c(torch.relu(self.b(self.start))) + self.d(torch.relu(self.a(x)))


def test_a_learned_constant_is_not_masked_because_it_does_not_change():
    speedup, error = check(Learned(), {})
    assert not speedup.plan.kept
    assert error == 0
    keep = torch.ones(8)
    keep[2:5] = 0
    masks = {"b": {"weight": keep.view(-1, 1, 1, 1).expand(8, 6, 3, 3), "bias": keep}}
    speedup, error = check(Learned(), masks)
    assert speedup.plan.counts == {"b": 5}
    assert error < 1e-5


class Scaled(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * 3, self.bias)


class Late(nn.Conv2d):
    def forward(self, x):
        return F.relu(F.conv2d(x, self.weight)) * 2 + self.bias.view(-1, 1, 1)


@pytest.mark.parametrize("kind", [Scaled, Late])
def test_nothing_is_folded_into_a_bias_that_is_not_added_to_that_weights_product(kind):
    speedup, error = check(Net(lambda y, gate: F.relu(y), lambda: kind(8, 4, 1)), producer_masks())
    assert not speedup.plan.kept
    assert not speedup.report.put_back
    assert error < 1e-5


def test_nothing_is_folded_into_a_shared_bias():
    model = Net(lambda y, gate: F.relu(y))
    model.c.bias = model.b.bias
    speedup, error = check(model, producer_masks())
    assert not speedup.plan.kept
    assert not speedup.report.put_back
    assert error < 1e-5


@pytest.mark.parametrize("reduce", [lambda y: y.mean(1), lambda y: y.amax(1), lambda y: y.softmax(1).amax(1)])
def test_a_unit_that_is_reduced_over_is_needed(reduce):
    """With ``exact_only=False`` such units may go, but only those that are masked."""

    class Reduced(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return reduce(self.a(x))

    model = Reduced()
    speedup, error = check(model, {}, exact_only=False)
    assert not speedup.plan.kept
    assert error == 0


def test_a_clamp_that_lifts_zero_is_summed_inexactly():
    class Lifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return F.hardtanh(self.a(x), 0.5, 1.0).sum(1)

    assert not ChannelGraph.watch(Lifted(), X).group("a").exact


class Cast(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.b(F.relu(self.a(x)))


class Reshaped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(8, 4))

    def forward(self, x):
        return torch.einsum("bd,dk->bk", torch.einsum("bchw,cd->bd", x, self.a).relu(), self.b)


@pytest.mark.parametrize("kind", [Cast, Reshaped])
def test_masks_are_seen_through_what_is_done_to_a_weight(kind):
    model = kind()
    graph = ChannelGraph.watch(model, X)
    plan = Plan(graph, {next(g.name for g in graph.groups if g.prunable): [0, 2, 3, 6, 7]})
    speedup, error = check(model, plan.masks(model))
    assert speedup.plan.counts == plan.counts
    assert not speedup.report.put_back
    assert error < (0.05 if kind is Cast else 1e-4)


def test_a_second_run_of_one_speedup_is_refused():
    speedup, _ = check(Cast(), {})
    with pytest.raises(RuntimeError, match="compact already"):
        speedup.speedup_model()


class TwoAttentions(nn.Module):
    """Masks may ask for heads of one attention, and for dimensions of every head of another."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.ModuleList([nn.Linear(8, 3 * 24), nn.Linear(8, 3 * 24)])
        self.out = nn.ModuleList([nn.Linear(24, 8), nn.Linear(24, 8)])

    def forward(self, x):
        for qkv, out, last in zip(self.qkv, self.out, [(-1, 6), (4, -1)], strict=True):
            q, k, v = (part.unflatten(-1, last).transpose(1, 2) for part in qkv(x).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v, scale=0.4)
            x = x + out(y.transpose(1, 2).flatten(2))
        return x


def test_each_attention_loses_what_its_masks_ask_for():
    model, x = TwoAttentions().double(), torch.randn(2, 5, 8, dtype=torch.float64)
    plan_heads = Plan(ChannelGraph.watch(model, x), {"qkv.0": [0, 2]})
    plan_dims = Plan(ChannelGraph.watch(model, x, units="head_dim"), {"qkv.1": [0, 1, 5]})
    masks = {**plan_heads.masks(model), **plan_dims.masks(model)}
    with torch.no_grad():
        for module, targets in masks.items():
            for target, mask in targets.items():
                getattr(model.get_submodule(module), target).mul_(mask)
    expected = model(x)
    speedup = ModelSpeedup(model, x, masks)
    compact = speedup.speedup_model()
    assert compact.qkv[0].out_features == 3 * 2 * 6
    assert compact.qkv[1].out_features == 3 * 4 * 3
    assert not speedup.report.put_back
    assert torch.allclose(compact(x), expected, atol=1e-12)

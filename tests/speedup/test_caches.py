"""Modules that keep, while in eval mode, what they worked out from their parameters."""

from __future__ import annotations

import copy

import torch
from torch import nn

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.speedup import ModelSpeedup, load_compact, save_compact
from nni_plugins.speedup.verify import largest_error


class BiasedAttention(nn.Module):
    """Attention with a table of biases, one a head and distance; picked once and kept in eval mode, as in LeViT."""

    def __init__(self, width=12, heads=4, tokens=5):
        super().__init__()
        self.heads, self.key_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.biases = nn.Parameter(torch.randn(heads, tokens))
        self.register_buffer("places", (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs(), persistent=False)
        self.kept = {}

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def picked(self):
        if self.training:
            return self.biases[:, self.places]
        if "cpu" not in self.kept:
            self.kept["cpu"] = self.biases[:, self.places]
        return self.kept["cpu"]

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, -1, self.key_dim).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.key_dim**-0.5 + self.picked()).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, -1))


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), BiasedAttention(), nn.Linear(12, 3)).eval()


@torch.no_grad()
def test_what_was_kept_before_a_speedup_is_worked_out_again(tmp_path):
    model, x = build(), torch.randn(2, 5, 6)
    model(x)
    assert model[1].kept, "the cache is filled before anything is watched"
    graph = ChannelGraph.watch(model, x)
    heads = next(g for g in graph.groups if any(m.parameter == "biases" for m in g.members))
    assert heads.prunable
    assert heads.exact
    masks = Plan(graph, {heads.name: [0, 2]}).masks(model)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for module, targets in masks.items():
            for target, mask in targets.items():
                masked.get_submodule(module).get_parameter(target).mul_(mask)
    masked.train().eval()
    speedup = ModelSpeedup(model, x, masks)
    compact = speedup.speedup_model()
    assert not speedup.report.put_back
    assert compact[1].biases.shape == (2, 5)
    assert not compact.training
    assert largest_error([compact(x)], [masked(x)])[1] < 1e-5
    save_compact(compact, tmp_path / "compact.safetensors")

    def build_and_run():
        built = build()
        built(x)
        return built

    loaded = load_compact(tmp_path / "compact.safetensors", build_and_run)
    assert torch.equal(loaded(x), compact(x))


@torch.no_grad()
def test_modes_stay_as_they_were_part_by_part():
    model, x = build().train(), torch.randn(2, 5, 6)
    model[2].eval()
    graph = ChannelGraph.watch(model, x)
    name = next(g.name for g in graph.groups if g.prunable and g.exact)
    compact = ModelSpeedup(model, x, Plan(graph, {name: [0]}).masks(model)).speedup_model()
    assert compact[1].training
    assert not compact[2].training

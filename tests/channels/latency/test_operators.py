"""Operators at other sizes are the operators that the compact model runs: the same calls, argument by argument."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.channels.latency.operators import Operand, is_view, key_of, record
from nni_plugins.channels.latency.sizes import Sizes
from nni_plugins.speedup import ModelSpeedup
from tests.random_networks import RandomCNN

COPIES = {"aten.clone.default", "aten.empty.memory_format"}


def keys(recorded: list, rows: Any = None) -> list[str]:
    found = []
    for op in recorded:
        if is_view(op.func) or op.name in COPIES:
            continue
        fractions = {} if rows is None else {row: float(share) for row, share in enumerate(rows)}
        found.append(key_of(op.func, *op.at(fractions)))
    return found


def predicted_and_run(model: nn.Module, x: Any, seed: int, exact: bool = True) -> tuple[list[str], list[str]]:
    """The calls that a table would time for a random plan, and those that the compact model makes."""
    rng = np.random.default_rng(seed)
    graph = ChannelGraph.watch(model.eval(), x)
    groups = [g for g in graph.groups if g.prunable and (g.exact or not exact)]
    assert groups
    plan = Plan(graph, {g.name: rng.choice(g.size, rng.integers(1, g.size + 1), replace=False) for g in groups})
    sizes = Sizes(graph)
    recorded = record(graph, model, x, sizes)
    compact = copy.deepcopy(model)
    speedup = ModelSpeedup(compact, x, plan.masks(compact), exact_only=exact)
    compact = speedup.speedup_model().eval()
    matrix, constants = sizes.pack()
    rows = matrix @ graph.cost_model.counts(speedup.plan.counts) + constants
    smaller = ChannelGraph.watch(compact, x)
    return keys(recorded, rows), keys(record(smaller, compact, x, Sizes(smaller)))


@pytest.mark.parametrize("seed", range(8))
def test_random_networks(seed: int) -> None:
    predicted, run = predicted_and_run(RandomCNN(seed), torch.randn(2, 3, 8, 8), seed)
    assert predicted == run


class Kinds(nn.Module):
    """Grouped, depthwise and transposed convolutions, norms over channels, a concatenation of three."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.b, self.c = nn.Conv2d(16, 12, 1), nn.Conv2d(16, 20, 1)
        self.up = nn.ConvTranspose2d(48, 24, 2, stride=2)
        self.norm = nn.GroupNorm(24, 24)
        self.last = nn.LayerNorm(24)
        self.hidden, self.head = nn.Linear(24, 32), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.depthwise(self.a(x)))
        x = torch.cat([self.b(x), self.c(x), x], 1)
        x = self.norm(self.up(x)).flatten(2).transpose(1, 2)
        return self.head(F.gelu(self.hidden(self.last(x))).mean(1))


@pytest.mark.parametrize("seed", range(4))
def test_every_kind_of_layer(seed: int) -> None:
    predicted, run = predicted_and_run(Kinds(), torch.randn(2, 3, 6, 6), seed, exact=False)
    assert predicted == run


@pytest.mark.parametrize("seed", range(2))
def test_attention(seed: int) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    predicted, run = predicted_and_run(nn.TransformerEncoder(layer, 2), torch.randn(2, 7, 32), seed)
    assert predicted == run


def test_fused_attention_is_timed_where_the_watch_saw_it_taken_apart() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model, x = Attention().eval(), torch.randn(2, 6, 32)
    graph = ChannelGraph.watch(model, x)
    (heads,) = [g for g in graph.groups if g.prunable]
    sizes = Sizes(graph)
    recorded = record(graph, model, x, sizes)
    (fused,) = [op for op in recorded if "scaled_dot_product" in op.name]
    assert [sizes.pack()[0][row, graph.groups.index(heads)] for row in fused.variables] == [0.25]
    args, _ = fused.at({fused.variables[0]: 0.5})
    assert [operand.shape for operand in args[:3]] == [(2, 2, 6, 8)] * 3


def test_a_resized_operand_keeps_its_layout() -> None:
    transposed = Operand((16, 8), (1, 16), torch.float32).resized((4, 8))
    assert transposed.stride == (1, 4)
    third = Operand((2, 5, 8), (120, 24, 1), torch.float32).resized((2, 5, 4))  # a third of a packed dimension
    assert third.stride == (60, 12, 1)
    expanded = Operand((4, 8, 3), (0, 3, 1), torch.float32).resized((4, 2, 3))
    assert expanded.stride == (0, 3, 1)
    last = Operand((1, 8, 4, 4), (128, 1, 32, 8), torch.float32).resized((1, 6, 4, 4))  # channels last
    assert last.stride == (96, 1, 24, 6)


def test_recording_leaves_the_model_as_it_was() -> None:
    model, x = RandomCNN(1).train(), torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    graph = ChannelGraph.watch(model, x)
    record(graph, model, x, Sizes(graph))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())

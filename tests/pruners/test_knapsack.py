"""The knapsack scope: the least importance lost of all states under the budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from nni_plugins.channels import ChannelGraph
from nni_plugins.pruners import MagnitudePruner
from nni_plugins.pruners.chain import Chain, GroupRanking
from nni_plugins.pruners.knapsack import group_losses, knapsack, lost_importance
from nni_plugins.speedup import ModelSpeedup


def _net(widths: tuple[int, ...] = (6, 10, 8)) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    before = 3
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 4)).eval()


def _chain(seed: int, sizes: tuple[int, ...]) -> Chain:
    random = np.random.default_rng(seed)
    rankings = [
        GroupRanking(str(index), random.gamma(1.0, 1.0 + index, size), np.zeros(size, dtype=bool))
        for index, size in enumerate(sizes)
    ]
    return Chain(rankings, "knapsack")


def _product(chain: Chain):
    """Cost of a chain of layers: each its inputs times its outputs, as convolutions cost."""

    def cost(state: np.ndarray) -> float:
        kept = [len(r.scores) - int(c[e]) for r, c, e in zip(chain.rankings, chain.counts, state, strict=True)]
        return float(sum(a * b for a, b in zip([3, *kept], [*kept, 4], strict=True)))

    return cost


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_it_is_near_the_best_of_all_states(seed, share):
    chain = _chain(seed, (6, 7, 5))
    cost, losses = _product(chain), group_losses(_chain(seed, (6, 7, 5)))
    budget = share * cost(chain.state(0))
    states = [np.array(s) for s in itertools.product(*(range(len(loss)) for loss in losses))]
    best = min(lost_importance(losses, s) for s in states if cost(s) <= budget)
    found = knapsack(chain, cost, budget)
    assert found is not None
    assert cost(found) <= budget
    everything = sum(loss[-1] for loss in losses)
    assert lost_importance(losses, found) <= best + 0.05 * everything


def test_costs_that_fall_in_steps_are_used():
    """A latency that falls only at multiples of 4 is worth whole steps, and never a part of one."""
    chain = _chain(3, (16, 16))

    def cost(state: np.ndarray) -> float:
        return float(sum(-(-(16 - int(c[e])) // 4) * 4 for c, e in zip(chain.counts, state, strict=True)))

    found = knapsack(chain, cost, 20.0)
    assert found is not None
    assert cost(found) <= 20
    assert all(int(c[e]) % 4 == 0 for c, e in zip(chain.counts, found, strict=True))


@pytest.mark.parametrize("target", ["macs", "params"])
def test_it_loses_no_more_than_global_ranking_and_meets_the_budget(target):
    x = torch.randn(1, 3, 8, 8)
    lost, costs = {}, {}
    for scope in ("global", "knapsack"):
        model = _net((12, 24, 24, 16))
        for layer in model:  # as training does: some filters matter more than others
            if isinstance(layer, nn.Conv2d):
                layer.weight.data *= torch.randn(len(layer.weight), 1, 1, 1).exp()
        dense = getattr(ChannelGraph.watch(model, x).cost(), target)
        config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
        pruner = MagnitudePruner(model, config, dummy_input=x, scope=scope, target=target, normalise=None)
        _, masks = pruner.compress()
        kept = pruner.plan.kept
        lost[scope] = sum(float(s.sum() - s[list(kept[n])].sum()) for n, s in pruner.scores.items() if n in kept)
        costs[scope] = getattr(pruner.plan.cost(), target) / dense
        pruner.unwrap_model()
        speedup = ModelSpeedup(model, x, masks)
        speedup.speedup_model()
        assert speedup.report.relative_error < 1e-5
    assert costs["knapsack"] <= 0.5
    assert lost["knapsack"] < lost["global"]  # what saves most for its importance goes first


def test_a_latency_budget_over_the_measured_table():
    from nni_plugins.channels.latency import LatencyTable

    x = torch.randn(1, 3, 16, 16)
    model = _net((16, 32, 32))
    graph = ChannelGraph.watch(model, x)
    table = LatencyTable.measure(graph, model, x, cache=False, seconds=2.0)
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.3}]
    pruner = MagnitudePruner(
        model, config, dummy_input=x, scope="knapsack", target="latency", latency=table, tolerance=0.1
    )
    pruner.compress()
    counts = {name: len(units) for name, units in pruner.plan.kept.items()}
    assert table.latency_ms(counts) <= 0.7 * table.latency_ms() * 1.001

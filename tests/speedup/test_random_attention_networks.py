"""Any network that mixes convolutions, norms and attention: what goes is removed, and the compact model is the masked one."""

import numpy as np
import pytest
import torch

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.speedup import ModelSpeedup
from tests.random_attention_networks import RandomNetwork
from tests.speedup.test_model_speedup import masked_output

FEW = 100
#: What was asked for is not all removed (the compact model is right): masks of dimensions of heads that are rotated,
#: and of learnt queries, are taken for other units than the graph that has rehearsed them offers.
LESS_GOES = {285, 792}
SEEDS = [
    *range(FEW),
    *(
        pytest.param(seed, marks=[pytest.mark.slow, *([pytest.mark.xfail] if seed in LESS_GOES else [])])
        for seed in range(FEW, 1000)
    ),
]
DIFFERED = "the compact model's output differed"  # what a group is put back for by the proof, not by the replay

#: Per seed that was run: what share of the parameters went.
shares: dict[int, float] = {}
put_back: dict[int, int] = {}


def random_plan(graph, seed):
    """Every exact group loses units, at a sparsity of its own."""
    rng = np.random.default_rng(seed)
    kept = {}
    for group in graph.groups:
        if group.prunable and group.exact:
            keep = rng.random(group.size) > rng.uniform(0.1, 0.9)
            keep[rng.integers(group.size)] = True
            kept[group.name] = keep
    return Plan(graph, kept)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_networks_with_attention(seed):
    model = RandomNetwork(seed).double()
    x = model.example()
    plan = random_plan(ChannelGraph.watch(model, x), seed)
    masks = plan.masks(model)
    expected = masked_output(model, masks, x)
    before = sum(p.numel() for p in model.parameters())
    speedup = ModelSpeedup(model, x, masks)
    compact = speedup.speedup_model().eval()
    report = speedup.report
    assert (compact(x) - expected).abs().max() <= 1e-9 * expected.abs().max().clamp(min=1e-3)
    assert report.relative_error < 1e-9
    assert not [line for line in report.put_back if DIFFERED in line]
    assert not report.inexact
    put_back[seed] = len(report.put_back)  # by a replay, which sees what sizes of 1 do to an einsum
    if not put_back[seed]:
        assert speedup.plan.counts == plan.counts
        assert report.macs_after == plan.cost().macs
    assert report.params_after == sum(p.numel() for p in compact.parameters())
    shares[seed] = 1 - report.params_after / before
    a_training_step(compact, x)


def a_training_step(model, x):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    model(x).square().mean().backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_something_goes_in_most():
    """Of those above that ran: a network of which nothing is prunable would make every other assertion empty."""
    if len(shares) < FEW // 2:
        pytest.skip("it looks at the networks above, which were not run")
    found = np.array(list(shares.values()))
    assert (found > 0.02).mean() > 0.95
    assert found.mean() > 0.15
    assert np.mean([count > 0 for count in put_back.values()]) < 0.05

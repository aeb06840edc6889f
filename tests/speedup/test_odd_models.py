"""Compact equals masked on nets that do what tracers trip over; what they prune is known, and does not get less."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.speedup import ModelSpeedup
from tests.random_networks import trained_like
from tests.speedup import odd_forwards  # noqa: F401  (registers more nets)
from tests.speedup.odd_nets import ODD, Found


def doubled(inputs):
    return tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, inputs)


def call(model, inputs):
    given = inputs if isinstance(inputs, (tuple, dict)) else (inputs,)
    out = model(**given) if isinstance(given, dict) else model(*given)
    leaves = tree_leaves([out.boxes, out.more] if isinstance(out, Found) else out)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def make(name):
    torch.manual_seed(0)
    model = ODD[name].build()
    trained_like(model)
    return model.double().eval(), doubled(ODD[name].inputs())


@pytest.mark.parametrize("name", ODD)
def test_what_it_prunes(name):
    model, inputs = make(name)
    graph = ChannelGraph.watch(model, inputs)
    found = {g.name.replace(":", "_"): g.size for g in graph.groups if g.prunable and g.exact}
    wanted = ODD[name].groups
    assert {key: found.get(key) for key in wanted} == wanted


def producers_of(model, plan, rng):
    """Masks as NNI's pruners make them: of the layers that produce, and of some of their biases."""
    masks, parameters = {}, dict(model.named_parameters())
    for name, units in plan.kept.items():
        group = plan.graph.group(name)
        gone = np.setdiff1d(np.arange(group.size), units)
        for member in group.producers:
            if member.parameter.startswith("bias") and rng.random() < 0.5:
                continue
            mask = masks.setdefault(member.module, {}).setdefault(
                member.parameter, torch.ones_like(parameters[member.name])
            )
            mask.index_fill_(member.dim, torch.as_tensor(member.indices[gone].ravel()), 0)
    return masks


#: What is written into zeros, slice by slice, is taken for zero, and so is the layer that made it, until the proof.
@pytest.mark.parametrize(
    ("name", "producers_only"),
    [(name, only) for name in ODD for only in (False, True)],
)
def test_compact_equals_masked_and_trains(name, producers_only):
    model, inputs = make(name)
    rng = np.random.default_rng(len(name))
    kept = {}
    graph = ChannelGraph.watch(model, inputs)
    for group in graph.groups:
        if group.prunable and group.exact:
            keep = rng.random(group.size) > rng.uniform(0.2, 0.7)
            keep[rng.integers(group.size)] = True
            kept[group.name] = keep
    plan = Plan(graph, kept)
    masks = producers_of(model, plan, rng) if producers_only else plan.masks(model)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for module, targets in masks.items():
            for target, mask in targets.items():
                getattr(masked.get_submodule(module), target).data.mul_(mask)
    speedup = ModelSpeedup(model, inputs, masks)
    compact = speedup.speedup_model()
    assert producers_only or speedup.plan.counts == plan.counts
    assert not speedup.report.put_back
    other = tree_map(
        lambda t: torch.randn_like(t) if isinstance(t, torch.Tensor) and t.is_floating_point() else t, inputs
    )
    for actual, wanted in zip(call(compact.eval(), other), call(masked, other), strict=True):
        assert (actual - wanted).abs().max() <= 1e-9 * wanted.abs().max() or speedup.report.inexact
    loss = sum(t.square().mean() for t in call(compact.train(), inputs))
    loss.backward()
    for key, parameter in compact.named_parameters():
        assert parameter.grad is None or parameter.grad.shape == parameter.shape, key
    torch.optim.SGD(compact.parameters(), 1e-3).step()
    assert all(torch.isfinite(t).all() for t in call(compact.eval(), other))


def test_parameters_made_in_inference_mode_are_pruned():
    """They take part in no training; nothing is written over them that torch refuses."""
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    ModelSpeedup(model, x, Plan(ChannelGraph.watch(model, x), {"0": [1, 2, 6]}).masks(model)).speedup_model()
    with torch.no_grad():
        assert model(x).shape == (2, 2, 8, 8)
    assert model[0].out_channels == 3

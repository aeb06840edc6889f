"""What every row of the rules' tables must show: the expected groups, and that removing them equals masking them."""

import copy

import numpy as np
import torch
from torch import nn

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.channels.call import output_tensors
from nni_plugins.channels.plan import mask_of
from nni_plugins.speedup import ModelSpeedup
from nni_plugins.speedup.verify import largest_error


class Call(nn.Module):
    """A function of (this module, input), with modules and parameters beside it."""

    def __init__(self, function, **members):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *x):
        return self.function(self, *x)


class Between(nn.Module):
    """A body between a convolution that makes its 8 channels, and one that reads what it leaves."""

    def __init__(self, body, width=8, dims=2):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.first, self.body, self.last = conv(3, 8, 1), body, conv(width, 5, 1)

    def forward(self, x):
        return self.last(self.body(self.first(x)))


class Beside(nn.Module):
    """A body on a residual stream of 16 tokens' channels."""

    def __init__(self, body):
        super().__init__()
        self.first, self.body, self.last = nn.Linear(6, 16), body, nn.Linear(16, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.body(x))


def drawn(model, seed=0):
    """Draw all weights, biases and statistics, so that none of them hides an error by being zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale, shift = (0.5, 0.0) if parameter.dim() > 1 else (1.0, 0.0 if "bias" in name else 1.0)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + shift)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def outputs(model, x):
    model.eval()
    with torch.no_grad():
        return [t for t in output_tensors(model(*x)) if t.is_floating_point()]


def masked_copy(model, masks):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module, targets in masks.items():
            for target, mask in targets.items():
                getattr(model.get_submodule(module), target).data.mul_(mask)
    return model


def producers_only(plan, model):
    """Masks of the rows that make the units which the plan removes, and of nothing else."""
    parameters, kept = dict(model.named_parameters()), {}
    for name, units in plan.kept.items():
        for member in plan.graph.group(name).producers:
            if (member.name, member.dim) not in plan.graph.trace.unmasked:
                gone = np.setdiff1d(np.arange(plan.graph.group(name).size), units)
                rows = np.setdiff1d(np.arange(parameters[member.name].shape[member.dim]), member.indices[gone])
                dims = kept.setdefault(member.name, {})  # one weight may make the units of several groups
                dims[member.dim] = np.intersect1d(rows, dims.get(member.dim, rows))
    masks = {}
    for name, dims in kept.items():
        module, _, target = name.rpartition(".")
        masks.setdefault(module, {})[target] = mask_of(parameters[name], dims)
    return masks


def prove(model, x, expected, stays=()):
    """Watch, compare the groups with ``expected``, and take half of each exact one out, by two kinds of masks.

    Parameters
    ----------
    expected
        ``{group: units}`` of every prunable group; negative where removing is not masking.
    stays
        Groups that masks of their producers alone cannot take out: something else still depends on what they leave.
        None where only masks of all that belongs to a unit are tried.
    """
    model = drawn(model.double().eval())
    x = tuple(t.double() if t.is_floating_point() else t for t in (x if isinstance(x, tuple) else (x,)))
    outputs(model, x)  # hooks set up what they need
    graph = ChannelGraph.watch(model, x)
    assert not graph.trace.unknown
    assert {g.name: g.size if g.exact else -g.size for g in graph.groups if g.prunable} == expected
    draw = np.random.default_rng(0)
    half = {g.name: draw.permutation(g.size)[: g.size // 2] for g in graph.groups if g.prunable and g.exact}
    plan = Plan(graph, half)
    if not plan.kept:
        return graph
    trials = [(plan.masks(model), plan.counts)]
    if stays is not None:
        few = {name: count for name, count in plan.counts.items() if name not in stays}
        trials.append((producers_only(plan, model), few))
    for masks, counts in trials:
        wanted = outputs(masked_copy(model, masks), x)
        assert all(torch.isfinite(t).all() for t in wanted)
        compact = copy.deepcopy(model)
        speedup = ModelSpeedup(compact, x, masks)
        speedup.speedup_model()
        assert speedup.plan.counts == counts
        assert not speedup.report.put_back
        assert largest_error(outputs(compact, x), wanted)[1] < 1e-9
    return graph

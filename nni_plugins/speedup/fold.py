"""Fold the constants that masked channels leave behind (a conv bias, a batch norm's shift) into the consumer's bias.

A masked channel whose norm is not masked is not zero but constant. Dropping it, as NNI's own speedup does, changes the
output. Folding is exact where the constant is the same at every position that the consumer sees: zero padding around a
convolution breaks that at the border, and the report says so.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from nni_plugins.channels.call import output_tensors
from nni_plugins.channels.labels import Array
from nni_plugins.channels.plan import Plan
from nni_plugins.channels.replay import plain_name
from nni_plugins.channels.rules.registry import rule_for
from nni_plugins.channels.watch import run_recorded
from nni_plugins.speedup.infer import Fold


@dataclass(frozen=True)
class FoldedBias:
    """What to add to the bias of ``module``; ``exact`` is False where a border makes it an approximation."""

    module: str
    delta: torch.Tensor
    exact: bool
    why: str


#: A unit goes only if it has one value at no fewer than this share of the positions that the consumer sees.
EVEN = 0.75


def measure(model: nn.Module, dummy_input: Any, plan: Plan, folds: list[Fold]) -> tuple[list[FoldedBias], list[Array]]:
    """Read the constants off one run of the masked model, and return what each consumer's bias must gain.

    Returned beside it are the labels of units that do not depend on the input, and yet differ from position to
    position: no bias can stand for them, so they must stay.

    Parameters
    ----------
    model
        The masked model, with the masks in its weights, not yet compacted.
    dummy_input
        The input that it was watched with.
    plan
        What is kept.
    folds
        From :class:`~nni_plugins.speedup.infer.MaskInference`.
    """
    if not folds:
        return [], []
    wanted: dict[tuple[str, str], list[Fold]] = {}
    for fold in folds:
        wanted.setdefault((fold.operator.module, plain_name(fold.operator.name)), []).append(fold)
    out: list[FoldedBias] = []
    uneven: list[Array] = []

    def look(func: Any, args: tuple, kwargs: dict, result: Any, module: str) -> None:
        for fold in wanted.pop((module, plain_name(rule_for(func)[0])), []):
            tensors, inputs = output_tensors((args, kwargs)), fold.operator.inputs
            # counted from the end: with real strides a product may come without its bias, which is added after it
            folded, stays = _fold(model, plan, fold, tensors[inputs.index(fold.contraction.left) - len(inputs)])
            out.append(folded)
            if stays.any():
                uneven.append(_labels(fold)[fold.units[stays]])

    run_recorded(model, dummy_input, look, data="real")
    for fold in itertools.chain(*wanted.values()):  # with masks, it is another way that the forward takes
        uneven.append(_labels(fold)[fold.units])
    return out, uneven


def _labels(fold: Fold) -> Array:
    labels = fold.contraction.left.labels[fold.contraction.left_dim]
    assert labels is not None
    return labels


def _fold(model: nn.Module, plan: Plan, fold: Fold, value: torch.Tensor) -> tuple[FoldedBias, Array]:
    c = fold.contraction
    rows = value.movedim(c.left_dim, 0).reshape(value.shape[c.left_dim], -1)[torch.as_tensor(fold.units)].double()
    spread = (rows.max(dim=1).values - rows.min(dim=1).values).max().item()
    size = rows.abs().max().item()
    constants = rows.median(dim=1).values
    even = ((rows - constants[:, None]).abs() <= 1e-5 * max(size, 1e-12)).double().mean(dim=1)
    weight: torch.Tensor = dict(model.named_modules())[fold.operator.module].weight.detach()
    units = torch.as_tensor(fold.units, device=weight.device)
    if c.groups == 1:  # of a wide layer, only the columns that go are looked at
        delta = _kernel_sums(weight.index_select(1, units)) @ constants.to(weight.device)
    else:
        delta = _times(_kernel_sums(weight), units, constants.to(weight.device), value.shape[c.left_dim], c.groups)
    why = ""
    if spread > 1e-5 * max(size, 1e-12):
        why = "the constant differs between positions"
    elif c.padded:
        why = "zero padding makes the border differ"
    labels = fold.operator.outputs[0].labels[c.out_dim]
    kept = torch.arange(len(delta)) if labels is None else torch.as_tensor(np.flatnonzero(plan.keeps(labels)))
    return FoldedBias(fold.operator.module, delta[kept.to(delta.device)], not why, why), (even < EVEN).cpu().numpy()


def _kernel_sums(weight: torch.Tensor) -> torch.Tensor:
    return (weight.flatten(2).sum(dim=2, dtype=torch.float64) if weight.dim() > 2 else weight).double()


def _times(table: torch.Tensor, units: torch.Tensor, constants: torch.Tensor, inputs: int, groups: int) -> torch.Tensor:
    """``table [out, in per group]`` times the constants of the removed inputs, zero elsewhere."""
    full = torch.zeros(inputs, dtype=table.dtype, device=table.device)
    full[units] = constants
    per_group = full.reshape(groups, -1).repeat_interleave(table.shape[0] // groups, dim=0)
    return (table * per_group).sum(dim=1)


@dataclass(frozen=True)
class Applied:
    """What :func:`apply` did, so that it can be taken back."""

    added: list[str]
    before: list[tuple[nn.Parameter, torch.Tensor]]


def apply(model: nn.Module, folded: list[FoldedBias]) -> Applied:
    """Add to the biases of the compacted model, making those that are missing."""
    modules = dict(model.named_modules())
    done = Applied([], [])
    with torch.no_grad():
        for item in folded:
            module = modules[item.module]
            weight, bias = module.weight, module.bias
            delta = item.delta.to(weight)
            if isinstance(bias, nn.Parameter):
                done.before.append((bias, bias.detach().clone()))
                bias.data.add_(delta)
            else:
                module.bias = nn.Parameter(delta.clone(), requires_grad=weight.requires_grad)
                done.added.append(f"{item.module}.bias" if item.module else "bias")
    return done


def remove(model: nn.Module, done: Applied) -> None:
    """Take back what :func:`apply` did; doing so twice does no more."""
    with torch.no_grad():
        for bias, value in reversed(done.before):
            bias.data.copy_(value)
    for name in done.added:
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, None)
    done.before.clear()
    done.added.clear()

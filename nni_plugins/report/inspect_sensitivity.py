"""How much quality each group costs: pruned alone, by magnitude, in masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nni_plugins.channels import Plan
from nni_plugins.channels.preserve import preserved
from nni_plugins.pruners.score import group_sums
from nni_plugins.report.inspect import InspectError, progress_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from nni_plugins.channels import ChannelGraph, ChannelGroup

SPARSITIES = (0.25, 0.5, 0.75)

Evaluate = Callable[[], tuple[str, bool, float]]


def sensitivity_of(
    model: nn.Module,
    graph: ChannelGraph,
    evaluate: Evaluate,
    sparsities: tuple[float, ...] = SPARSITIES,
    console: Console | None = None,
) -> dict[str, Any]:
    """Return the metric of the model with each group pruned alone.

    The units with the smallest L1 norm (over producers, norms and consumers) are masked: their weights are multiplied
    by zero, and put back bit for bit afterwards. Where a group is inexact, masking is not removing, and the figure is
    near what removal would give, not equal to it.

    Parameters
    ----------
    model
        Its parameters, buffers and modes are afterwards what they were.
    graph
        Of the model.
    evaluate
        Returns the metric's name, whether more is better, and the model's value.
    sparsities
        Shares of a group's units; at least one unit stays.
    console
        Where progress is shown.

    Returns
    -------
    dict
        ``metric``, ``higher_is_better``, ``dense``, ``sparsities`` and ``groups``: per prunable group its values by
        sparsity (``{'0.5': 0.93}``).
    """
    sparsities = tuple(sorted(set(sparsities or SPARSITIES)))
    groups = [group for group in graph.groups if group.prunable]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    before = [(parameter, parameter.detach().clone(), parameter.grad) for parameter in model.parameters()]
    values: dict[str, dict[str, float]] = {}
    steps = len(groups) * len(sparsities)
    try:
        with _progress(console, "sensitivity") as step:
            name, higher, dense = _evaluated(model, evaluate)
            if not math.isfinite(dense):
                raise InspectError(
                    f"the metric {name} of the model as it is is {dense}; nothing can be compared with it"
                )
            for group in groups:
                order = _by_magnitude(group, parameters)
                values[group.name] = {}
                for sparsity in sparsities:
                    step(len(values) * len(sparsities) - len(sparsities) + sparsities.index(sparsity), steps)
                    kept = order[min(round(sparsity * group.size), group.size - 1) :]
                    with _masked(Plan(graph, {group.name: kept.numpy()}), model, parameters):
                        values[group.name][f"{sparsity:g}"] = _evaluated(model, evaluate)[2]
    finally:
        with torch.no_grad():
            for parameter, value, gradient in before:
                parameter.copy_(value)
                parameter.grad = gradient
    return {
        "metric": name,
        "higher_is_better": higher,
        "dense": dense,
        "sparsities": list(sparsities),
        "groups": {
            key: {at: value if math.isfinite(value) else None for at, value in found.items()}
            for key, found in values.items()
        },
    }


def _by_magnitude(group: ChannelGroup, parameters: dict[str, nn.Parameter]) -> torch.Tensor:
    """Return the group's units, the least important first."""
    names = {member.name for member in group.members if not member.name.endswith("bias")}
    values = {name: parameters[name].detach().abs() for name in names if name in parameters}
    total = group_sums(group, values)
    return torch.arange(group.size) if total is None else total.cpu().argsort(stable=True)


@contextmanager
def _masked(plan: Plan, model: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Multiply weights by the plan's masks for as long as this lasts."""
    masks = {
        f"{module}.{parameter}" if module else parameter: mask
        for module, found in plan.masks(model).items()
        for parameter, mask in found.items()
    }
    tensors = {id(parameters[name]): (parameters[name], mask) for name, mask in masks.items()}
    before = [(tensor, tensor.detach().clone()) for tensor, _ in tensors.values()]
    with torch.no_grad():
        for tensor, mask in tensors.values():
            tensor.mul_(mask)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


def _evaluated(model: nn.Module, evaluate: Evaluate) -> tuple[str, bool, float]:
    with preserved(model):  # a metric that trains norms or draws random numbers must not tell of the order of groups
        model.eval()
        return evaluate()


@contextmanager
def _progress(console: Console | None, what: str) -> Iterator[Callable[[int, int], None]]:
    if console is None:
        yield lambda done, total: None
        return
    with progress_of(console, what) as step:
        yield step

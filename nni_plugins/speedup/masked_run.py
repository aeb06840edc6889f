"""Running a model as if its masks were in its weights, without changing or copying the whole of them.

While a module's forward runs, the parameters that it uses hold their masked values, and afterwards what they held
before. A masked copy lives only that long, so that a run takes little more memory than one without masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nni_plugins.channels.graph import ChannelGraph


def under(data: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return what ``mask`` leaves of ``data``; what it hides is 0, never -0."""
    return data.mul(mask.to(data)).add_(0.0)


@contextmanager
def masks_in_force(model: nn.Module, masks: Mapping[str, torch.Tensor], graph: ChannelGraph) -> Iterator[None]:
    """Let every forward of ``model`` meet masked parameters.

    Parameters
    ----------
    model
        The model at its full size.
    masks
        By parameter name.
    graph
        The graph of the model: it knows which module's forward uses which parameter.
    """
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    by_module: dict[int, list[str]] = {}
    for user, names in _users(graph, masks).items():
        by_module[id(modules[user])] = sorted(names)
    depth: dict[str, int] = {}
    held: dict[str, torch.Tensor] = {}

    def enter(module: nn.Module, args: Any) -> None:
        for name in by_module.get(id(module), ()):
            depth[name] = depth.get(name, 0) + 1
            if depth[name] == 1:
                held[name] = parameters[name].data
                parameters[name].data = under(parameters[name].data, masks[name])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        for name in by_module.get(id(module), ()):
            depth[name] -= 1
            if not depth[name]:
                parameters[name].data = held.pop(name)

    before = nn.modules.module.register_module_forward_pre_hook(enter)
    after = nn.modules.module.register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
        for name, data in held.items():
            parameters[name].data = data


def joined(
    masks: Mapping[str, torch.Tensor], others: Mapping[str, Mapping[str, torch.Tensor]], graph: ChannelGraph
) -> dict[str, torch.Tensor]:
    """Return masks by parameter name that hide what either hides; ``others`` are in NNI's form."""
    found = dict(masks)
    for module, targets in others.items():
        for target, mask in targets.items():
            name = f"{module}.{target}" if module else target
            if name in graph.shapes:  # of a tied parameter, its first name
                found[name] = mask * found[name].to(mask) if name in found else mask
    return found


def _users(graph: ChannelGraph, masks: Mapping[str, torch.Tensor]) -> dict[str, set[str]]:
    """Return ``{module: masked parameters}`` that its forward uses; what an exchanged module uses, its children do."""
    first = {alias: name for name, aliases in graph.aliases.items() for alias in aliases}
    users: dict[str, set[str]] = {}
    for operator in graph.trace.operators:
        for info in operator.inputs:
            name = first.get(info.parameter, info.parameter)
            if name in masks:
                users.setdefault(operator.module, set()).add(name)
    unseen = set(masks).difference(*users.values())
    if unseen:  # what the watched run did not use (an expert that got no token), another run may
        users.setdefault("", set()).update(unseen)
    for module, names in list(users.items()):
        for flexible in graph.trace.flexible:
            if module != flexible and module.startswith(f"{flexible}." if flexible else ""):
                users.setdefault(flexible, set()).update(names)
    return users

"""The call_module nodes that NNI's replacers read: ``speedup.node_infos``, made from the watched run."""

from __future__ import annotations

import torch
from nni.compression.speedup.container import NodeInfo
from torch import nn

from nni_plugins.channels.call import Info
from nni_plugins.channels.plan import Plan


def build_nodes(plan: Plan, model: nn.Module, masks: dict[str, torch.Tensor]) -> dict[torch.fx.Node, NodeInfo]:
    """Return a node for every call of a leaf module, in order, with the masks that replacers ask for.

    Each node's ``output_masks`` has the output's shape with a batch of one, 0 at what the plan removes; ``param_masks``
    the shape of each parameter. Arguments that no leaf module made are nodes too, so that their masks can be read.
    """
    graph = torch.fx.Graph()
    made: dict[int, torch.fx.Node] = {}
    infos: dict[torch.fx.Node, NodeInfo] = {}
    modules = dict(model.named_modules())
    device = next((parameter.device for parameter in model.parameters()), None)

    def node_of(info: Info) -> torch.fx.Node:
        node = made.get(id(info))
        if node is None:
            node = graph.placeholder(f"value_{len(made)}")
            made[id(info)] = node
            infos[node] = NodeInfo(node)
            infos[node].output_masks = activation_mask(plan, info, device)
        return node

    for call in plan.graph.trace.calls:
        module = modules.get(call.module)
        if module is None or not call.outputs or plan.removal.holds(call.module):
            continue
        node = graph.call_module(call.module, tuple(node_of(info) for info in call.inputs))
        info = infos[node] = NodeInfo(node)
        info.module = module
        info.output_masks = (
            activation_mask(plan, call.outputs[0], device)
            if len(call.outputs) == 1
            else tuple(activation_mask(plan, out, device) for out in call.outputs)
        )
        info.param_masks = {
            name: _parameter_mask(plan, f"{call.module}.{name}" if call.module else name, parameter, masks)
            for name, parameter in module.named_parameters(recurse=False)
        }
        for out in call.outputs:
            made[id(out)] = node
    return infos


def activation_mask(plan: Plan, info: Info, device: torch.device | None = None) -> torch.Tensor:
    """Return the mask of one tensor of the run: its shape with a batch of one, 0 at what the plan removes."""
    shape = list(info.shape)
    if shape and info.dynamic:
        shape[0] = 1
    mask = torch.ones(shape, device=device)
    for dim, labels in enumerate(info.labels):
        if labels is not None and mask.shape[dim] == len(labels):
            gone = (~plan.keeps(labels)).nonzero()[0]
            mask.index_fill_(dim, torch.as_tensor(gone, device=device), 0)
    return mask


def _parameter_mask(plan: Plan, name: str, parameter: torch.Tensor, masks: dict[str, torch.Tensor]) -> torch.Tensor:
    from nni_plugins.channels.plan import mask_of

    mask = mask_of(parameter, plan.dimensions(name))
    return mask * masks[name].to(mask) if name in masks else mask

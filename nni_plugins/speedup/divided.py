"""Masks of weights that are divided by their own norm: a row of zeros would be 0/0, and NaN everywhere after it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from nni_plugins.channels.graph import ChannelGraph


def without_divisors(graph: ChannelGraph, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``masks`` in which what a weight norm multiplies by is masked in place of what it divides by.

    ``g * v / |v|`` is zero where ``g`` is; where all of a row of ``v`` is masked, that of ``g`` is masked for it.

    Parameters
    ----------
    graph
        The graph of the model; ``graph.trace.unmasked`` says which parameters are divided by.
    masks
        By parameter name; they are left as they are.
    """
    out = dict(masks)
    for name, dim in sorted(graph.trace.unmasked):
        labels = graph.trace.parameters[name][dim]
        if name not in masks or labels is None:
            continue
        others = tuple(d for d in range(masks[name].dim()) if d != dim)
        gone = ~(masks[name] != 0).sum(dim=others).bool() if others else masks[name] == 0
        classes = graph.solution.classes[labels[gone.cpu().numpy()]]
        scale = _scale_of(graph, name, classes)
        if not gone.any() or scale is None:
            continue
        factor, along = scale
        own = graph.trace.parameters[factor][along]
        rows = torch.as_tensor(np.isin(graph.solution.classes[own], classes), device=masks[name].device)
        shape = graph.shapes[factor]
        mask = out.get(factor, torch.ones(shape, dtype=masks[name].dtype, device=rows.device))
        out[factor] = mask.index_fill(along, torch.nonzero(rows).flatten(), 0)
        pattern = (masks[name] != 0).any(dim, keepdim=True)  # what the other rows have masked, for their inputs go
        kept = (pattern | ~pattern.any()).to(masks[name])
        out[name] = torch.where(gone.view([-1 if d == dim else 1 for d in range(kept.dim())]), kept, masks[name])
    return out


def _scale_of(graph: ChannelGraph, name: str, classes: np.ndarray) -> tuple[str, int] | None:
    """Return the parameter, and its dimension, that multiplies what ``name`` is normalised to."""
    for operator in graph.trace.operators:
        if operator.name.startswith("aten._weight_norm") and operator.inputs[0].parameter == name:
            scale = operator.inputs[1]
            for dim, labels in enumerate(scale.labels):
                if scale.parameter and labels is not None and np.isin(classes, graph.solution.classes[labels]).all():
                    return scale.parameter, dim
    return None

"""Masks for models that other libraries pruned: from weights that are zero, and from ``torch.nn.utils.prune``."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import prune

Masks = dict[str, dict[str, torch.Tensor]]


def masks_of_zeros(model: nn.Module, threshold: float = 0.0) -> Masks:
    """Return NNI's masks ``{module: {parameter: mask}}`` for the weights of ``model`` that are zero.

    For a model that was pruned elsewhere and saved with zeros in its weights: ``ModelSpeedup(model, x,
    masks_of_zeros(model))``. A tensor that is zero everywhere was never pruned but started so (a residual block's last
    norm, a head) and gets no mask; only a bias that is zero throughout is masked where its rows of the weight are.

    Parameters
    ----------
    model
        The model; it is not changed.
    threshold
        Weights of at most this absolute value count as zero; 0 by default.

    Raises
    ------
    ValueError
        If ``threshold`` is negative.
    """
    if not threshold >= 0:
        raise ValueError(f"masks_of_zeros: threshold is {threshold}; it must be 0 or more")
    masks: Masks = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        found = {}
        for target, parameter in own.items():
            mask = _nonzero(parameter, threshold)
            if not mask.any():
                made_of = own.get("weight") if target == "bias" and not getattr(module, "transposed", False) else None
                rows = _rows(made_of, threshold)
                mask = torch.ones_like(mask) if rows is None or rows.shape != mask.shape else rows
            if not mask.all():
                found[target] = mask.to(parameter.dtype)
        if found:
            masks[name] = found
    return masks


def _nonzero(parameter: torch.Tensor, threshold: float) -> torch.Tensor:
    return parameter.detach().abs() > threshold


def _rows(weight: torch.Tensor | None, threshold: float) -> torch.Tensor | None:
    """Which rows of a weight are not zero throughout; None where the whole weight is."""
    if weight is None:
        return None
    rows = _nonzero(weight, threshold).flatten(1).any(dim=1) if weight.dim() > 1 else _nonzero(weight, threshold)
    return rows if rows.any() else None


def masks_of_torch_prune(model: nn.Module) -> Masks:
    """Make what ``torch.nn.utils.prune`` masks permanent, and return its masks as NNI's: ``{module: {name: mask}}``.

    The model computes what it did, and holds plain parameters again (as after ``torch.nn.utils.prune.remove``), which
    a speedup can make smaller: ``ModelSpeedup(model, x, masks_of_torch_prune(model))``.

    Raises
    ------
    ValueError
        If nothing in the model is masked that way.
    """
    masks: Masks = {}
    for name, module in model.named_modules():
        hooks = [h for h in module._forward_pre_hooks.values() if isinstance(h, prune.BasePruningMethod)]
        for hook in hooks:
            target: str = hook._tensor_name
            mask = getattr(module, f"{target}_mask").detach().clone()
            prune.remove(module, target)
            masks.setdefault(name, {})[target] = mask
    if not masks:
        raise ValueError("nothing in the model is masked by torch.nn.utils.prune")
    return masks

"""Live compaction: dead channels leave a model that is being trained, and all that trains it follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugins.channels import Plan


def compact_live(
    model: nn.Module,
    dummy_input: Any,
    plan: Plan,
    *,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    copies: Iterable[nn.Module] = (),
    masks: Mapping[str, Tensor | None] | None = None,
    exact_only: bool = True,
) -> dict[str, Tensor | None]:
    """Take what a plan removes out of a model between two optimizer steps.

    Parameters keep their identity, so that optimizers, schedules and whoever else holds them go on; momentum and
    gradients lose the same indices. The result is proved against the masked model; what cannot go stays.

    Parameters
    ----------
    model : torch.nn.Module
        The model; not wrapped.
    dummy_input : tensor, tuple or dict
        What it is watched on.
    plan : Plan
        What is kept; of a graph of this model.
    optimizers : iterable of torch.optim.Optimizer
        Those that step it.
    copies : iterable of torch.nn.Module
        Models of the same structure that must follow, such as an average of weights
        (``torch.optim.swa_utils.AveragedModel``).
    masks : mapping of str to torch.Tensor, optional
        Masks of single weights, by parameter name.
    exact_only : bool
        Leave alone what cannot be removed without changing the output.

    Returns
    -------
    dict of str to torch.Tensor
        ``masks``, smaller.
    """
    from nni_plugins.speedup import ModelSpeedup
    from nni_plugins.speedup.compact import sliced
    from nni_plugins.speedup.optimizer import fit_optimizer

    speedup = ModelSpeedup(model, dummy_input, plan.masks(model), exact_only=exact_only)
    speedup.speedup_model()
    for optimizer in optimizers:
        fit_optimizer(optimizer, speedup)
    assert speedup.plan is not None
    slices = speedup.plan.slices()
    for copy in copies:
        inner = averaged(copy)
        ModelSpeedup(inner, dummy_input, speedup.plan.masks(inner), exact_only=exact_only, verify=False).speedup_model()
    result: dict[str, Tensor | None] = {}
    for name, mask in (masks or {}).items():
        index = {dim: torch.as_tensor(kept) for dim, kept in slices.get(name, {}).items()}
        result[name] = (
            mask if mask is None or not index else sliced(mask, {d: k.to(mask.device) for d, k in index.items()})
        )
    return result


def averaged(copy: nn.Module) -> nn.Module:
    """The model that an ``AveragedModel`` holds, or the copy itself."""
    inner = getattr(copy, "module", None)
    return inner if isinstance(inner, nn.Module) else copy

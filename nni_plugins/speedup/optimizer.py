"""An optimizer from before a speedup goes on after it: its momentum loses the same units as the parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import Parameter

from nni_plugins.speedup.compact import sliced
from nni_plugins.speedup.record import record_of

if TYPE_CHECKING:
    from nni_plugins.channels.labels import Array
    from nni_plugins.speedup.model_speedup import ModelSpeedup


def fit_optimizer(optimizer: torch.optim.Optimizer, speedup: ModelSpeedup) -> None:
    """Make an optimizer that was made, and has stepped, before a speedup fit the compact model.

    Parameters keep their identity in a speedup, so the optimizer still holds the right ones. What it keeps for each
    (momentum, running squares) has the old shapes, and loses the same indices here. A bias that the speedup added joins
    the parameter group of its module's weight. Doing so twice does no more.

    Parameters
    ----------
    optimizer
        Any optimizer whose state has the parameter's shape, or 1 in some dimensions: all of ``torch.optim``. LBFGS,
        which keeps one vector for all parameters, forgets what it has seen, and begins anew.
    speedup
        The :class:`~nni_plugins.speedup.ModelSpeedup`, after ``speedup_model()``.

    Raises
    ------
    ValueError
        In one line: the speedup has not run, or the state of a parameter that shrank has another shape; then nothing is
        changed.
    """
    if speedup.plan is None:
        raise ValueError("the speedup has not run; call speedup_model() before fit_optimizer()")
    parameters = dict(speedup.bound_model.named_parameters())
    shapes = speedup.plan.graph.shapes
    smaller: list[tuple[dict, str, torch.Tensor]] = []
    if isinstance(optimizer, torch.optim.LBFGS):
        before, optimizer._numel_cache = optimizer._numel_cache, None
        if before not in (None, optimizer._numel()):
            optimizer.state.clear()
    for name, dims in speedup.plan.slices().items():
        state = optimizer.state.get(parameters[name], {}) if name in parameters else {}
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.numel() > 1 and value.shape != parameters[name].shape:
                smaller.append((state, key, _smaller(name, key, value, shapes[name], dims)))
    for state, key, value in smaller:
        state[key] = value
    added = (record_of(speedup.bound_model) or {}).get("added", ())
    _join(optimizer, {name: parameters[name] for name in added if name in parameters}, parameters)


def _smaller(name: str, key: str, value: torch.Tensor, shape: tuple[int, ...], dims: dict[int, Array]) -> torch.Tensor:
    if value.dim() != len(shape) or any(size not in (1, whole) for size, whole in zip(value.shape, shape, strict=True)):
        raise ValueError(
            f"optimizer: {key!r} of {name} has shape {tuple(value.shape)}, which is not the parameter's "
            f"{tuple(shape)}; make a new optimizer"
        )
    index = {dim: torch.as_tensor(kept, device=value.device) for dim, kept in dims.items() if value.shape[dim] > 1}
    return sliced(value, index)


def _join(optimizer: torch.optim.Optimizer, added: dict[str, Parameter], parameters: dict[str, Parameter]) -> None:
    """Put added biases into the group that holds their module's weight."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for name, bias in added.items():
        module = name.rpartition(".")[0]
        group = groups.get(id(parameters.get(f"{module}.weight" if module else "weight")))
        if group is None or id(bias) in groups:
            continue
        group["params"].append(bias)
        if "param_names" in group:
            group["param_names"].append(name)

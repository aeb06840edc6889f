"""Two-way exchange with ``torch.nn.utils.prune``: NNI's masks as its reparametrisation, and its masks as NNI's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune

from nni_plugins.speedup.origins import masks_of_torch_prune

_logger = logging.getLogger(__name__)
Masks = dict[str, dict[str, Tensor]]


def to_torch_prune(model: nn.Module, masks: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Put masks on a model as ``torch.nn.utils.prune`` does: ``weight_orig``, ``weight_mask`` and a hook.

    The parameters stay the same objects, under their new names, so an optimizer goes on with them; a parameter that
    torch masks already is masked by both. ``torch.nn.utils.prune.remove(module, 'weight')`` makes a mask permanent.

    Parameters
    ----------
    model
        Without NNI's wrappers (``unwrap_model()``); changed in place.
    masks
        NNI's ``{module: {parameter: mask}}``. Masks of inputs and outputs have no such form and are left out.

    Returns
    -------
    torch.nn.Module
        The model.

    Raises
    ------
    ValueError
        The model is wrapped, or a mask names no parameter of it or has another shape. The model is unchanged then.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    wrapped = next((name for name, module in modules.items() if hasattr(module, "_nni_wrapper")), None)
    if wrapped is not None:
        raise ValueError(f"{wrapped} is wrapped by NNI; call the pruner's unwrap_model() first")
    todo: list[tuple[str, nn.Module, str, Tensor]] = []
    for module_name, targets in masks.items():
        for target, mask in targets.items():
            name = f"{module_name}.{target}" if module_name else target
            if target.startswith(("_input", "_output")):
                _logger.warning("%s: torch.nn.utils.prune masks parameters only; left out", name)
                continue
            module = modules.get(module_name)
            held = module._parameters if module is not None else {}
            if mask is None or (target in held and held[target] is None):
                continue  # no bias
            parameter = held.get(target, held.get(f"{target}_orig"))
            if module is None or parameter is None:
                raise ValueError(f"masks: {name} is no parameter of the model")
            if parameter.shape != mask.shape:
                raise ValueError(f"masks: {name} has shape {list(parameter.shape)}, its mask {list(mask.shape)}")
            todo.append((module_name, module, target, mask))
    seen: set[tuple[int, str]] = set()
    for _, module, target, mask in todo:
        if (id(module), target) not in seen:  # one module under two names
            seen.add((id(module), target))
            parameter = module._parameters.get(target, module._parameters.get(f"{target}_orig"))
            prune.custom_from_mask(module, target, mask.to(parameter))
    for module in set(modules.values()):
        if isinstance(module, nn.MultiheadAttention) and (id(module.out_proj), "weight") in seen:
            module.register_forward_pre_hook(_refresh_projection)
    return model


def from_torch_prune(model: nn.Module) -> Masks:
    """Masks of ``torch.nn.utils.prune`` as NNI's; the model holds plain parameters again, zero where masked.

    Parameters
    ----------
    model
        Masked by torch; changed in place, as by ``torch.nn.utils.prune.remove``.

    Returns
    -------
    dict
        NNI's ``{module: {parameter: mask}}``, for ``ModelSpeedup`` or a pruner's ``update_masks``.

    Raises
    ------
    ValueError
        Nothing in the model is masked that way.
    """
    return masks_of_torch_prune(model)


def _refresh_projection(attention: nn.Module, inputs: Any) -> None:
    """Attention reads its output projection without calling it, so that torch's hook on it never runs."""
    projection = attention.out_proj
    assert isinstance(projection, nn.Module)
    for hook in list(projection._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            hook(projection, inputs)

"""Masks as NNI gives them, checked against the model and put into its weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nni_plugins.compat.defects.mask_files import load_masks


def read_masks(masks_or_file: Any, map_location: Any = None) -> Mapping[str, Mapping[str, torch.Tensor | None]]:
    """Return masks given as NNI's dictionary, or as the path of a file that holds one.

    Raises
    ------
    ValueError
        If the file holds something else.
    FileNotFoundError
        If there is no such file.
    """
    if isinstance(masks_or_file, Mapping):
        return masks_or_file
    if not isinstance(masks_or_file, (str, Path)):
        kind = type(masks_or_file).__name__
        raise ValueError(f"masks: {{module: {{target: mask}}}} or the path of a file is needed, not a {kind}")
    path = Path(masks_or_file)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such mask file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        masks: dict[str, dict[str, torch.Tensor | None]] = {}
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a mask file: {str(error).splitlines()[0]}") from None
        for name, mask in tensors.items():
            module, _, target = name.rpartition(".")
            masks.setdefault(module, {})[target] = mask
        return masks
    try:
        loaded = load_masks(path, map_location)
    except Exception as error:
        raise ValueError(f"{path}: not a mask file: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Mapping) for value in loaded.values()):
        raise ValueError(f"{path}: not a mask file: it must hold {{module: {{target: mask}}}}")
    return loaded


def parameter_masks(model: nn.Module, masks: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Return NNI's masks by parameter name, every name and shape checked; parameters that share storage share a mask.

    Raises
    ------
    ValueError
        In one line, if a module, target or shape does not fit the model, or a mask is of an input or output.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, torch.Tensor] = {}
    for module_name, targets in masks.items():
        module = modules.get(module_name)
        if module is None and module_name.startswith("module."):  # masks made under DataParallel
            module = modules.get(module_name.removeprefix("module."))
        if module is None:
            near = difflib.get_close_matches(module_name, modules, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"masks: the model has no module {module_name!r}{hint}")
        if not isinstance(targets, Mapping):
            raise ValueError(f"masks: {module_name!r} needs {{target: mask}}, not a {type(targets).__name__}")
        for target, mask in targets.items():
            if mask is None:
                continue
            where = f"{module_name}.{target}" if module_name else target
            if not isinstance(mask, torch.Tensor):
                raise ValueError(f"masks: {where} has a {type(mask).__name__} for a mask; it must be a tensor")
            if target.startswith(("_input_", "_output_")):
                raise ValueError(
                    f"masks: {where} masks an activation; mask parameters, or pass graph_module for NNI's own path"
                )
            parameter = getattr(module, target, None)
            if not isinstance(parameter, nn.Parameter):
                if parameter is None and target == "bias":
                    continue  # NNI lists a mask for a bias that is not there
                raise ValueError(f"masks: {where} is not a parameter of the model")
            if tuple(mask.shape) != tuple(parameter.shape):
                raise ValueError(f"masks: {where} has shape {tuple(parameter.shape)}, its mask {tuple(mask.shape)}")
            name = names[id(parameter)]
            mask = mask.detach().to(parameter.device)
            found[name] = found[name] * mask if name in found else mask
    return found


def bake(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Multiply the masks into the model's weights; what is masked becomes 0, never -0. Return what they were."""
    before = {}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            before[name] = parameters[name].detach().clone()
            parameters[name].data.mul_(mask.to(parameters[name].dtype)).add_(0.0)
    return before


def unbake(model: nn.Module, before: Mapping[str, torch.Tensor]) -> None:
    """Put the weights back that :func:`bake` changed."""
    parameters = dict(model.named_parameters())
    for name, data in before.items():
        parameters[name].data.copy_(data)

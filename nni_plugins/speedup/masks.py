"""Masks of any origin, read, checked against the model and put into its weights."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from nni_plugins.compat.defects.mask_files import load_masks

NniMasks = Mapping[str, Mapping[str, Any]]

#: What names of modules gain when a model is wrapped: by DataParallel and DDP, by torch.compile.
_PREFIXES = ("module.", "_orig_mod.")
#: How NNI calls masks of what goes into a module and comes out of it.
ACTIVATIONS = ("_input_", "_output_")


def read_masks(masks_or_file: Any, map_location: Any = None) -> NniMasks:
    """Return masks as NNI's dictionary ``{module: {target: mask}}``.

    Parameters
    ----------
    masks_or_file
        NNI's dictionary; a flat one, ``{'conv.weight': mask}``; the ``state_dict`` of a model that is masked, by NNI or
        by ``torch.nn.utils.prune``, from which the masks are taken; or the path of a file that holds one of these
        (``torch.save``, safetensors, or ``numpy.savez``).
    map_location
        As in ``torch.load``, for a file of ``torch.save``.

    Raises
    ------
    ValueError
        In one line, if it is something else, or the file cannot be read.
    FileNotFoundError
        If there is no such file.
    """
    if isinstance(masks_or_file, Mapping):
        return _nested(masks_or_file, "masks")
    if not isinstance(masks_or_file, (str, Path)):
        if isinstance(masks_or_file, tuple) and len(masks_or_file) == 2 and isinstance(masks_or_file[1], Mapping):
            raise ValueError("masks: compress() returns a model and its masks; pass the masks, its second part")
        kind = type(masks_or_file).__name__
        raise ValueError(f"masks: {{module: {{target: mask}}}} or the path of a file is needed, not a {kind}")
    path = Path(masks_or_file)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such mask file")
    try:
        loaded = _READERS.get(path.suffix, load_masks)(path, map_location)
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: not a mask file: {lines[0]}") from None
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path}: not a mask file: it must hold {{module: {{target: mask}}}}")
    return _nested(loaded, f"{path}: not a mask file")


def _from_safetensors(path: Path, map_location: Any) -> Any:
    from safetensors.torch import load_file

    return load_file(path)


def _from_numpy(path: Path, map_location: Any) -> Any:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


_READERS: dict[str, Callable[[Path, Any], Any]] = {".safetensors": _from_safetensors, ".npz": _from_numpy}


def _nested(masks: Mapping[str, Any], what: str) -> NniMasks:
    """Return masks by module and target, be they given so or flat."""
    if all(isinstance(targets, Mapping) for targets in masks.values()):
        return masks
    if any(isinstance(targets, Mapping) for targets in masks.values()):
        name = next(name for name, targets in masks.items() if not isinstance(targets, Mapping))
        raise ValueError(f"{what}: {name!r} needs {{target: mask}}, not a {type(masks[name]).__name__}")
    flat = {
        name.removesuffix("_mask").replace("_nni_wrapper.", ""): mask
        for name, mask in masks.items()
        if _is_mask(name, masks)
    }
    if not flat:
        for name, value in masks.items():
            if value is not None and not (isinstance(value, (torch.Tensor, np.ndarray)) and _is_binary(value)):
                raise ValueError(
                    f"{what}: {name!r} holds no mask of 0 and 1; {{module: {{target: mask}}}}, {{name: mask}} or the "
                    "state_dict of a masked model is needed"
                )
        flat = dict(masks)
    found: dict[str, dict[str, Any]] = {}
    for name, mask in flat.items():
        module, _, target = name.rpartition(".")
        found.setdefault(module, {})[target] = mask
    return found


def _is_mask(name: str, masks: Mapping[str, Any]) -> bool:
    """Whether an entry of a flat dictionary is the mask of another, or all of them are masks by name."""
    target = name.removesuffix("_mask")
    return target != name and (
        target in masks or f"{target}_orig" in masks or all(other.endswith("_mask") for other in masks)
    )


def _is_binary(value: Any) -> bool:
    return bool(((value == 0) | (value == 1)).all())


def parameter_masks(model: nn.Module, masks: NniMasks) -> dict[str, torch.Tensor]:
    """Return NNI's masks by parameter name, checked; parameters that share storage share a mask.

    A mask may be a tensor or NumPy array of any kind of number, on any device, or a number, and of any shape that
    broadcasts to its parameter's: it says what the weight is multiplied with. Masks of activations are left out (see
    :func:`activation_masks`).

    Raises
    ------
    ValueError
        In one line, if a module, target or shape does not fit the model.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, torch.Tensor] = {}
    for where, module, target, value in _entries(model, masks):
        mask = _tensor(value, where)
        if target.startswith(ACTIVATIONS):
            continue
        parameter = getattr(module, target, None)
        if not isinstance(parameter, nn.Parameter):
            if parameter is None and target == "bias":
                continue  # NNI lists a mask for a bias that is not there
            if isinstance(parameter, nn.Module):
                raise ValueError(f"masks: {where!r} needs {{target: mask}}, not a mask")
            raise ValueError(f"masks: {where} is not a parameter of the model{_instead(module, target)}")
        if not _fits(mask.shape, parameter.shape):
            raise ValueError(f"masks: {where} has shape {tuple(parameter.shape)}, its mask {tuple(mask.shape)}")
        name = names[id(parameter)]
        mask = mask.to(parameter.device).expand(parameter.shape)
        found[name] = found[name] * mask if name in found else mask
    return found


def activation_masks(model: nn.Module, masks: NniMasks) -> dict[tuple[str, str], torch.Tensor]:
    """Return masks of what goes into modules and comes out of them: ``{(module name, target): mask}``.

    Masks that mask nothing are left out.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found = [
        ((names[id(module)], target), _tensor(value, where))
        for where, module, target, value in _entries(model, masks)
        if target.startswith(ACTIVATIONS)
    ]
    return {place: mask for place, mask in found if not bool(mask.all())}


def _entries(model: nn.Module, masks: NniMasks) -> list[tuple[str, nn.Module, str, Any]]:
    """Return every mask that is given, with its full name, module and target."""
    _refuse_torch_prune(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for name, targets in masks.items():
        module = _module(modules, name)
        if not isinstance(targets, Mapping):
            raise ValueError(f"masks: {name!r} needs {{target: mask}}, not a {type(targets).__name__}")
        for target, mask in targets.items():
            if mask is not None:
                where = f"{name}.{target}" if name else target
                found.append((where, module, target, mask))
    return found


def _module(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    """Find a module by its name, with or without the prefix that a wrapper around the model gives or gave."""
    if not name and isinstance(modules[""], (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return modules["module"]
    candidates = [name]
    for prefix in _PREFIXES:
        candidates += [f"{name}.".removeprefix(prefix).removesuffix("."), f"{prefix}{name}".removesuffix(".")]
    for candidate in candidates:
        if candidate in modules:
            return modules[candidate]
    near = difflib.get_close_matches(name, modules, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"masks: the model has no module {name!r}{hint}")


def _tensor(mask: Any, where: str) -> torch.Tensor:
    if isinstance(mask, (np.ndarray, Number)) and not isinstance(mask, complex):
        array = np.asarray(mask)
        if array.dtype.kind in "biuf":
            mask = torch.as_tensor(array.copy())
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"masks: {where} has a {type(mask).__name__} for a mask; it must be a tensor")
    mask = mask.detach()
    mask = mask if mask.layout == torch.strided else mask.to_dense()
    if mask.is_floating_point() and not math.isfinite(mask.sum(dtype=torch.promote_types(mask.dtype, torch.float32))):
        raise ValueError(f"masks: {where} has a mask that is not finite everywhere")
    return mask


def _fits(mask: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    pairs = zip(reversed(mask), reversed(shape), strict=False)
    return len(mask) <= len(shape) and all(m in (1, s) for m, s in pairs)


def _instead(module: nn.Module, target: str) -> str:
    if hasattr(module, "parametrizations") and target in module.parametrizations:  # type: ignore[operator]
        return f": it is computed; mask what it is made of, parametrizations.{target}.original"
    return ""


def _refuse_torch_prune(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                where = f"{name}.{hook._tensor_name}" if name else hook._tensor_name
                raise ValueError(
                    f"{where} is masked by torch.nn.utils.prune; make that permanent first, and take its masks: "
                    "masks = nni_plugins.speedup.masks_of_torch_prune(model)"
                )


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


def unmasked(mask: torch.Tensor) -> np.ndarray:
    """Return which entries a mask keeps, over the first two dimensions: a kernel is alive if any of it is."""
    alive = as_numpy(mask) != 0  # many times faster than torch's
    if alive.ndim <= 2:
        return np.asarray(alive)
    positions = alive.reshape(*alive.shape[:2], -1)
    return np.asarray(np.logical_or.reduce([positions[:, :, place] for place in range(positions.shape[2])]))


def as_numpy(mask: torch.Tensor) -> np.ndarray:
    """Return a mask as a NumPy array, without a copy where there need not be one."""
    mask = mask.detach().cpu()
    return np.asarray(mask.float() if mask.dtype == torch.bfloat16 else mask)

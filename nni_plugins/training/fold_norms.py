"""Batch norms into the layers before them, so that what is quantised is what runs.

Which norm follows which layer is seen in one run: a norm is folded where its input is exactly what the layer returned
and nothing else reads it. The result is checked against the model before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from nni_plugins.training.errors import CompressionError
from nni_plugins.training.loaders import apply

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


@dataclass
class Readers(TorchFunctionMode):
    """Counts, in a run, who reads what modules return: functions by name, modules by object."""

    made: dict[int, tuple[nn.Module, Tensor]] = field(default_factory=dict)
    read: dict[int, list[str]] = field(default_factory=dict)
    inside: list[nn.Module] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(value, Tensor) for value in tree_leaves(result)):  # else it asked for a size or the like
            for value in tree_leaves((args, kwargs or {})):
                if isinstance(value, Tensor) and id(value) in self.made:
                    self.read.setdefault(id(value), []).append(getattr(func, "__name__", str(func)))
        return result

    def of(self, tensor: Tensor) -> list[str]:
        """The functions that read a tensor that a module returned."""
        return self.read.get(id(tensor), [])


@torch.no_grad()
def flow(model: nn.Module, inputs: Any, kinds: tuple[type, ...]) -> tuple[dict[nn.Module, Tensor], Any, Readers]:
    """Run a model in evaluation mode and note what modules of some kinds returned, and who read it.

    Returns
    -------
    tuple
        What each such module returned (those called once only), what each got, and the readers.
    """
    readers, returned, got, calls = Readers(), {}, {}, dict[nn.Module, int]()
    modes = [(module, module.training) for module in model.modules()]

    def note(module: nn.Module, args: Any, output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(output, Tensor):
            returned[module] = output
            readers.made[id(output)] = (module, output)  # kept alive, so that no other tensor gets its place
        if args and isinstance(args[0], Tensor):
            got[module] = args[0]

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, kinds)]
    try:
        model.eval()
        with readers:
            apply(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    once = {module: tensor for module, tensor in returned.items() if calls[module] == 1}
    return once, {module: got[module] for module in once if module in got}, readers


@torch.no_grad()
def fold_norms(model: nn.Module, inputs: Any, tolerance: float = 1e-4) -> list[str]:
    """Fold batch norms into the convolutions and linear layers that feed them, in place.

    Parameters
    ----------
    model
        Without wrappers. A folded norm becomes ``nn.Identity``; its layer gets a bias.
    inputs
        An input of the model, on its device.
    tolerance
        Largest difference of the output that rounding may make, in shares of its size.

    Returns
    -------
    list of str
        The norms that were folded.

    Raises
    ------
    CompressionError
        The output differs by more than the tolerance.
    """
    returned, got, readers = flow(model, inputs, (*LAYERS, _BatchNorm))
    owners = {id(tensor): module for module, tensor in returned.items() if isinstance(module, LAYERS)}
    names = {module: name for name, module in model.named_modules()}
    shared = _shared(model)
    before = _first(apply(model.eval(), inputs))
    folded = []
    for norm, tensor in got.items():
        layer = owners.get(id(tensor))
        if not isinstance(norm, _BatchNorm) or layer is None or not norm.track_running_stats:
            continue
        if len(readers.of(tensor)) != 1 or layer.weight in shared or (layer.bias is not None and layer.bias in shared):
            continue
        if isinstance(layer, nn.Linear) and tensor.dim() != 2:  # the norm's channels are another dimension
            continue
        _fold(layer, norm)
        gone = nn.Identity().train(norm.training)
        for holder in list(model.modules()):  # under each of its names
            for attribute, child in list(holder._modules.items()):
                if child is norm:
                    setattr(holder, attribute, gone)
        folded.append(names[norm])
    after = _first(apply(model, inputs))
    error = float((after - before).abs().max() / before.abs().max().clamp(min=1e-12))
    if not error <= tolerance:
        raise CompressionError(f"folding batch norms changes the output by {error:.2g} of its size; please report this")
    return folded


def _fold(layer: Any, norm: Any) -> None:
    mean, variance = norm.running_mean, norm.running_var
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    weight = layer.weight.detach()
    if transposed:  # [inputs, outputs of a group, ...]
        inputs, outputs = weight.shape[:2]
        parts = weight.reshape(layer.groups, inputs // layer.groups, outputs, *weight.shape[2:])
        shape = (layer.groups, 1, outputs, *[1] * (weight.dim() - 2))
        layer.weight.data = (parts * scale.reshape(shape)).reshape(weight.shape)
    else:
        layer.weight.data = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.detach()
    shift = torch.zeros_like(mean) if norm.bias is None else norm.bias
    layer.bias = nn.Parameter((bias - mean) * scale + shift)


def _shared(model: nn.Module) -> set[Tensor]:
    """Parameters that several modules hold."""
    seen: dict[Tensor, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            seen[parameter] = seen.get(parameter, 0) + 1
    return {parameter for parameter, count in seen.items() if count > 1}


def _first(output: Any) -> Tensor:
    tensors = [leaf.float().flatten() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return torch.cat(tensors)

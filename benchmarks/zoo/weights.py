"""Random weights under which nothing hides: no zeros, no constants, and no signal that fades with depth."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nni_plugins.channels.watch import as_arguments, map_tensors

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def draw(model: nn.Module, seed: int = 0) -> None:
    """Draw anew what is constant in a freshly built model: norm scales, biases, LayerScales and heads that are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _NORMS) and module.weight is not None:
                module.weight.fill_(1)
        for parameter in model.parameters():
            _draw(parameter, generator)


def calibrate(model: nn.Module, inputs: Any, masks: dict[str, dict[str, torch.Tensor]], seed: int = 0) -> None:
    """Scale the weights so that the *masked* model passes on to its end what happens early in it.

    One forward of it in eval mode scales every convolution and linear layer so that its output has a standard deviation
    of one, and gives batch norms statistics of the size of what they see. What is masked gets its weights back.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    hidden = {
        parameters[f"{module}.{target}" if module else target]: mask
        for module, targets in masks.items()
        for target, mask in targets.items()
    }
    before = {parameter: parameter.detach().clone() for parameter in hidden}
    scales: dict[nn.Parameter, float] = {}
    hooks: list[Any] = []
    for module in model.modules():
        if isinstance(module, _BATCH_NORMS):
            hooks.append(module.register_forward_pre_hook(_statistics(generator)))
        elif _is_contraction(module):
            hooks.append(module.register_forward_hook(_unit_scale(scales)))
    args, kwargs = as_arguments(inputs)
    model.eval()
    try:
        with torch.no_grad():
            for parameter, mask in hidden.items():
                parameter.mul_(mask)
            model(*args, **kwargs)
            for parameter, value in before.items():
                parameter.copy_(value.div_(scales.get(parameter, 1.0)))
    finally:
        for hook in hooks:
            hook.remove()


def _draw(parameter: torch.Tensor, generator: torch.Generator) -> None:
    if not parameter.is_floating_point() or not parameter.numel():
        return
    low, high = parameter.min(), parameter.max()
    noise = torch.randn(parameter.shape, generator=generator)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        parameter.copy_(0.05 * noise)
    elif low == high:
        value = low.item()
        if abs(value) > 0.5:
            parameter.copy_(value * (1 + 0.25 * noise.clamp(-2, 2)))
        elif 0 < abs(value) < 0.5 and parameter.dim() == 1:
            parameter.copy_(0.5 + 0.1 * noise)  # a LayerScale
        else:
            parameter.copy_((0.1 if parameter.dim() == 1 else 0.05) * noise)


def _is_contraction(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() >= 2 and not isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def _unit_scale(scales: dict[nn.Parameter, float]) -> Any:
    done = False

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal done
        if done or not isinstance(output, torch.Tensor) or not output.is_floating_point() or output.numel() < 2:
            return output
        done = True
        scale = output.float().std().item()
        if not 1e-6 < scale < 1e6:
            return output
        for name in ("weight", "bias"):
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.div_(scale)
                scales[parameter] = scales.get(parameter, 1.0) * scale
        return output / scale

    return hook


def _statistics(generator: torch.Generator) -> Any:
    done = False

    def hook(module: Any, args: Any) -> None:
        nonlocal done
        if done or module.running_mean is None:
            return
        done = True
        x = args[0].float()
        # Of the size of all channels together, and not centred: channel by channel, on one small image, rounding is
        # all that would be left after some layers.
        size = x.pow(2).mean().expand(x.shape[1]) + 1e-6
        noise = torch.randn(size.shape, generator=generator)
        module.running_mean.copy_(0.3 * noise * size.sqrt())
        module.running_var.copy_(size * (0.7 + 0.6 * torch.rand(size.shape, generator=generator)))

    return hook


def redraw(inputs: Any, seed: int) -> Any:
    """Return inputs of the same shapes: floats are drawn, integers (tokens) change places, masks stay."""

    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator).to(tensor)
        if tensor.dtype == torch.bool or not tensor.numel():
            return tensor
        order = torch.randperm(tensor.numel(), generator=generator)
        return tensor.flatten()[order].reshape(tensor.shape)

    return map_tensors(draw, inputs)


def two_of(inputs: Any) -> Any:
    """Return a batch twice as large."""
    drawn: list[torch.Tensor] = []
    map_tensors(lambda tensor: drawn.append(tensor) or tensor, redraw(inputs, 77))
    other = iter(drawn)
    return map_tensors(lambda tensor: _joined(tensor, next(other)), inputs)


def _joined(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.cat([a, b]) if a.dim() else a

"""Replacers for NNI's own ``ModelSpeedup``: the module types that it does not know.

``nni.compression.speedup.ModelSpeedup(model, x, masks, customized_replacers=REPLACERS)`` then knows them too.
Each function slices its module in place, by the masks that NNI inferred for its input and output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from nni.compression.speedup.replacement import convert_to_coarse_mask, replace_module
from nni.compression.speedup.replacer import DefaultReplacer
from torch import nn

from nni_plugins.speedup.compact import sliced

Replace = Callable[[nn.Module, Any], nn.Module]


def _kept(mask: Any, dim: int = 1) -> torch.Tensor:
    return convert_to_coarse_mask(mask, dim)[1]


def _first(masks: Any) -> torch.Tensor:
    return masks[0] if isinstance(masks, (tuple, list)) else masks


def _slice(module: nn.Module, name: str, index: dict[int, torch.Tensor]) -> None:
    tensor = getattr(module, name, None)
    if isinstance(tensor, torch.Tensor):
        tensor.grad = None
        tensor.data = sliced(tensor.data, {dim: kept.to(tensor.device) for dim, kept in index.items()})


def replace_norm(module: nn.Module, masks: Any) -> nn.Module:
    """Batch and instance norms of any dimension: weight, bias and statistics follow the channels."""
    kept = _kept(_first(masks[0]))
    for name in ("weight", "bias", "running_mean", "running_var"):
        _slice(module, name, {0: kept})
    norm: Any = module
    norm.num_features = len(kept)
    return module


def replace_convolution(module: nn.Module, masks: Any) -> nn.Module:
    """Convolutions of any dimension, plain, grouped and transposed.

    Raises
    ------
    ValueError
        If the groups of a grouped convolution would keep different numbers of channels.
    """
    conv: Any = module
    inputs, outputs = _kept(_first(masks[0])), _kept(masks[1])
    out_dim = 1 if conv.transposed else 0
    _slice(module, "bias", {0: outputs})
    if conv.groups == 1:
        _slice(module, "weight", {out_dim: outputs, 1 - out_dim: inputs})
    else:
        conv.groups = _slice_grouped(conv, inputs, outputs)
    conv.in_channels, conv.out_channels = len(inputs), len(outputs)
    return module


def _slice_grouped(conv: Any, inputs: torch.Tensor, outputs: torch.Tensor) -> int:
    """Slice the weight of a grouped convolution, and return how many groups are left."""
    groups, per_in, per_out = conv.groups, conv.in_channels // conv.groups, conv.out_channels // conv.groups
    left = sorted(set((inputs // per_in).tolist()) & set((outputs // per_out).tolist()))
    columns = {tuple((inputs[inputs // per_in == g] % per_in).tolist()) for g in left}
    rows = {tuple((outputs[outputs // per_out == g] % per_out).tolist()) for g in left}
    within = rows if conv.transposed else columns
    if len({len(c) for c in columns}) != 1 or len({len(r) for r in rows}) != 1 or len(within) != 1:
        raise ValueError(f"a convolution of {groups} groups would keep different channels in each; mask whole groups")
    along = inputs if conv.transposed else outputs
    _slice(conv, "weight", {0: along, 1: torch.tensor(next(iter(within)))})
    return len(left)


def unchanged(module: nn.Module, masks: Any) -> nn.Module:
    """Modules that hold no size."""
    return module


_TYPES: dict[str, Replace] = {
    "BatchNorm3d": replace_norm,
    "SyncBatchNorm": replace_norm,
    "InstanceNorm1d": replace_norm,
    "InstanceNorm3d": replace_norm,
    "Conv3d": replace_convolution,
    "ConvTranspose1d": replace_convolution,
    "ConvTranspose3d": replace_convolution,
    **dict.fromkeys(
        (
            "AdaptiveAvgPool1d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d "
            "AlphaDropout AvgPool1d AvgPool3d ConstantPad1d ConstantPad2d ConstantPad3d Dropout1d Identity "
            "LPPool2d MaxPool1d MaxPool3d ReflectionPad1d ReflectionPad2d ReplicationPad2d Softsign "
            "UpsamplingBilinear2d UpsamplingNearest2d ZeroPad1d ZeroPad3d"
        ).split(),
        unchanged,
    ),
}

#: For ``customized_replacers``. NNI's own types stay NNI's.
REPLACERS = [DefaultReplacer({name: replace for name, replace in _TYPES.items() if name not in replace_module})]

#: For ``customized_mask_updaters``; none is needed for the modules above.
MASK_UPDATERS: list[Any] = []

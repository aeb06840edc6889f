"""Replacers for NNI's own ``ModelSpeedup``: the module types that it does not know.

``nni.compression.speedup.ModelSpeedup(model, x, masks, customized_replacers=REPLACERS)`` then knows them too.
Each function slices its module in place, by the masks that NNI inferred for its input and output. Modules that need
more than masks of activations (attention, recurrent and other closed modules) are taken out by ``MASK_UPDATERS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from nni.compression.speedup.replacement import convert_to_coarse_mask, replace_module
from nni.compression.speedup.replacer import DefaultReplacer
from nni.compression.utils import get_nested_attr, set_nested_attr
from torch import nn
from torch.fx import Node
from torch.utils._pytree import tree_map

from nni_plugins.speedup.compact import sliced

Replace = Callable[[nn.Module, Any], nn.Module]


class TypeReplacer(DefaultReplacer):
    """NNI's ``DefaultReplacer``, but for modules that are called with keyword arguments or constants, too."""

    def takes(self, node: Node, module: nn.Module) -> bool:
        """Whether it has a function for this call of a module; one whose input is named it leaves to others."""
        return type(module).__name__ in self.replace_module_func_dict and any(
            isinstance(arg, Node) for arg in node.args
        )

    def replace_modules(self, speedup: Any) -> None:
        for own in [replacer for replacer in speedup.replacers if is_nnis(replacer)][:-1]:
            speedup.replacers.remove(own)  # it appends its own to the list that it is given, each time: one is enough
        visited = set()
        for node, info in speedup.node_infos.items():
            if node.op != "call_module" or info.replaced or not node.target:
                continue
            module = get_nested_attr(speedup.bound_model, node.target)
            if not self.takes(node, module):
                continue
            if node.target not in visited:
                replace = self.replace_module_func_dict[type(module).__name__]
                inputs = tree_map(
                    lambda arg: speedup.node_infos[arg].output_masks if isinstance(arg, Node) else None, node.args
                )
                set_nested_attr(
                    speedup.bound_model, node.target, replace(module, (inputs, info.output_masks, info.param_masks))
                )
            visited.add(node.target)
            info.replaced = True


def is_nnis(replacer: Any) -> bool:
    """Whether it is the one that NNI adds by itself."""
    return type(replacer) is DefaultReplacer and replacer.replace_module_func_dict is replace_module


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


def replace_rms_norm(module: nn.Module, masks: Any) -> nn.Module:
    """RMSNorm. Its mean counts masked channels too, which are 0: the weight and ``eps`` make up for those that went.

    Of ``N`` channels ``K`` are kept: with the weight times ``sqrt(N / K)`` and ``eps`` times ``N / K`` the result is
    what it was. A norm without a weight has nothing to make up with, and is only sliced.
    """
    norm: Any = module
    before = tuple(norm.normalized_shape)
    mask = _first(masks[0])
    index = {dim: _kept(mask, dim - len(before)) for dim in range(len(before))}
    _slice(module, "weight", index)
    norm.normalized_shape = tuple(len(index[dim]) for dim in range(len(before)))
    ratio = math.prod(before) / math.prod(norm.normalized_shape)
    if norm.weight is not None and ratio != 1:
        norm.weight.data.mul_(math.sqrt(ratio))
        norm.eps = (torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps) * ratio
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


def replace_bilinear(module: nn.Module, masks: Any) -> nn.Module:
    """Bilinear: both inputs and the output."""
    bilinear: Any = module
    first, second = (_kept(mask, -1) for mask in masks[0][:2])
    outputs = _kept(masks[1], -1)
    _slice(module, "weight", {0: outputs, 1: first, 2: second})
    _slice(module, "bias", {0: outputs})
    bilinear.in1_features, bilinear.in2_features, bilinear.out_features = len(first), len(second), len(outputs)
    return module


def replace_embedding_bag(module: nn.Module, masks: Any) -> nn.Module:
    """EmbeddingBag: the width of the embedding; its rows stay."""
    outputs = _kept(masks[1], -1)
    _slice(module, "weight", {1: outputs})
    bag: Any = module
    bag.embedding_dim = len(outputs)
    return module


def replace_channel_shuffle(module: nn.Module, masks: Any) -> nn.Module:
    """ChannelShuffle: what is kept must be the same channels of each group, or the same groups.

    Raises
    ------
    ValueError
        If it is neither.
    """
    mask = _first(masks[0])
    kept = _kept(mask)
    shuffle: Any = module
    per_group = mask.shape[1] // shuffle.groups
    groups, within = torch.unique(kept // per_group), torch.unique(kept % per_group)
    if len(groups) * len(within) != len(kept):
        raise ValueError(f"a channel shuffle of {shuffle.groups} groups would keep different channels in each")
    shuffle.groups = len(groups)
    return module


def replace_unflatten(module: nn.Module, masks: Any) -> nn.Module:
    """Unflatten: the sizes that it holds are counted again."""
    unflatten: Any = module
    if not isinstance(unflatten.dim, int):
        return module  # named tensors
    first = unflatten.dim % _first(masks[0]).dim()
    sizes = unflatten.unflattened_size
    counted = tuple(len(_kept(masks[1], first + i)) for i in range(len(sizes)))
    unflatten.unflattened_size = tuple(-1 if old == -1 else new for old, new in zip(sizes, counted, strict=True))
    return module


def unchanged(module: nn.Module, masks: Any) -> nn.Module:
    """Modules that hold no size."""
    return module


_TYPES: dict[str, Replace] = {
    "BatchNorm3d": replace_norm,
    "SyncBatchNorm": replace_norm,
    "InstanceNorm1d": replace_norm,
    "InstanceNorm3d": replace_norm,
    "RMSNorm": replace_rms_norm,
    "Conv3d": replace_convolution,
    "ConvTranspose1d": replace_convolution,
    "ConvTranspose3d": replace_convolution,
    "Bilinear": replace_bilinear,
    "EmbeddingBag": replace_embedding_bag,
    "ChannelShuffle": replace_channel_shuffle,
    "Unflatten": replace_unflatten,
    **dict.fromkeys(
        (
            "AdaptiveAvgPool1d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d "
            "AlphaDropout AvgPool1d AvgPool3d CircularPad1d CircularPad2d CircularPad3d ConstantPad1d ConstantPad2d "
            "ConstantPad3d Dropout1d FeatureAlphaDropout Fold FractionalMaxPool2d FractionalMaxPool3d GLU Hardshrink "
            "Identity LPPool1d LPPool2d LPPool3d LogSoftmax MaxPool1d MaxPool3d MaxUnpool1d MaxUnpool2d MaxUnpool3d "
            "PixelUnshuffle ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d "
            "ReplicationPad3d Softmax2d Softmin Softsign Threshold Unfold UpsamplingBilinear2d UpsamplingNearest2d "
            "ZeroPad1d ZeroPad3d"
        ).split(),
        unchanged,
    ),
}

#: For ``customized_replacers``. NNI's own types stay NNI's.
REPLACERS = [TypeReplacer({name: replace for name, replace in _TYPES.items() if name not in replace_module})]

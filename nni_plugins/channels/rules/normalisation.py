"""Norms: their weight, bias and statistics belong to the channel; across channels, removing is not masking."""

from __future__ import annotations

import numpy as np

from nni_plugins.channels.call import Call
from nni_plugins.channels.labels import MaybeLabels
from nni_plugins.channels.rules.registry import rule

_ACROSS = "normalised across channels"
_ALWAYS_BATCH = frozenset(["aten._batch_norm_with_update", "aten._batch_norm_with_update_functional"])
_NEVER_BATCH = frozenset(["aten._native_batch_norm_legit_no_training", "aten._batch_norm_no_update"])


@rule(
    "aten.native_batch_norm",
    "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_no_training",
    "aten._batch_norm_no_update",
    "aten._batch_norm_with_update",
    "aten._batch_norm_with_update_functional",
    "aten._batch_norm_impl_index",
    "aten.batch_norm",
    "aten.cudnn_batch_norm",
    "aten.miopen_batch_norm",
)
def batch_norm(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    channels = x.labels[1]
    weight, mean = call.tensor(1, "weight"), call.tensor(3, "running_mean")
    for info in (weight, call.tensor(2, "bias"), mean, call.tensor(4, "running_var")):
        if info is not None:
            if channels is None:
                channels = info.labels[0]
            call.tie(channels, info.labels[0])
    if x.labels[1] is None:
        call.freeze(channels, "the norm of something of fixed size")
    by_batch = _by_batch(call)
    for dim in range(len(x.shape)) if by_batch else ():
        if dim != 1:
            call.inexact(x.labels[dim], _ACROSS)
            call.mix(dim)
    call.zero = [dim == 1 and (weight is not None or (by_batch and x.zeros[1])) for dim in range(len(x.shape))]
    call.size_of("num_features", channels)
    if channels is not None:
        call.size_of("num_features", np.unique(channels))  # an instance norm repeats its channels for each example
    for index in range(1, len(call.outputs)):  # the saved mean and deviation, empty in some versions
        if call.shape(index) == x.shape[1:2]:
            call.give(index, [x.labels[1]])
    return list(x.labels)


def _by_batch(call: Call) -> bool:
    """Whether the statistics are those of the input: in training, and where none were kept."""
    name = call.cause.operator
    if name in _ALWAYS_BATCH or name in _NEVER_BATCH:
        return name in _ALWAYS_BATCH
    return bool(call.value(3 if call.func._overloadname == "no_stats" else 5, "training", False))


@rule("aten.native_layer_norm", "aten._fused_rms_norm", "aten.rms_norm", "aten.layer_norm")
def layer_norm(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    rank, dims = len(x.shape), len(call.value(1, "normalized_shape"))
    weight, bias = call.tensor(2, "weight"), call.tensor(3, "bias")
    for dim in range(rank - dims, rank):
        call.inexact(x.labels[dim], _ACROSS)
        call.mix(dim)
    for info in (weight, bias):
        if info is not None:
            for labels, other in zip(x.labels[-dims:], info.labels, strict=True):
                call.tie(labels, other)
    if dims == 1:
        call.size_of("normalized_shape", x.labels[-1])
    call.zero = [*(z and bias is None for z in x.zeros[:-dims]), *[weight is not None] * dims]
    for index in range(1, len(call.outputs)):  # mean and deviation
        if len(call.shape(index)) == rank:
            call.give(index, [*x.labels[:-dims], *[None] * dims])
    return list(x.labels)


@rule("aten.native_group_norm", "aten.group_norm")
def group_norm(call: Call) -> list[MaybeLabels]:
    native = call.cause.operator == "aten.native_group_norm"
    x, groups = call.inputs[0], int(call.value(6 if native else 1, "group" if native else "num_groups", 1))
    weight, bias = (call.tensor(1, "weight"), call.tensor(2, "bias")) if native else (call.tensor(2), call.tensor(3))
    channels = x.labels[1]
    for info in (weight, bias):
        if info is not None:
            call.tie(channels, info.labels[0])
    for labels in x.labels[2:]:
        call.inexact(labels, _ACROSS)
    call.mix(*range(1, len(x.shape)))
    call.zero = [x.zeros[0] and bias is None, weight is not None, *[False] * (len(x.shape) - 2)]
    if channels is None:
        return list(x.labels)
    call.size_of("num_channels", channels)
    if groups == 1:
        call.inexact(channels, _ACROSS)
        return list(x.labels)
    group, inner = call.fresh(groups), call.fresh(len(channels) // groups)
    call.trace.labels.prefer(group, heads=False)  # whole groups go exactly; channels in a group share statistics
    call.inexact(inner, _ACROSS)
    call.trace.labels.relate(channels, group, inner, call.because("group norm"))
    call.size_of("num_groups", group)
    for index in (1, 2):  # mean and deviation of each group
        if index < len(call.outputs) and call.shape(index)[-1:] == (groups,):
            call.give(index, [None, group])
    return list(x.labels)


@rule("aten._weight_norm_interface", "aten._weight_norm")
def weight_norm(call: Call) -> list[MaybeLabels]:
    """``g * v / |v|``, with a norm for each index of one dimension: zeros add nothing to the norms of the others."""
    v, g = call.inputs[:2]
    kept = int(call.value(2, "dim", 0)) % len(v.shape)
    for dim, labels in enumerate(v.labels):
        if dim == kept:
            call.tie(labels, g.labels[dim])
            call.divides(v, labels)
        else:
            call.sum_over(v, dim)
    call.zero = [g.zeros[dim] if dim == kept else v.zeros[dim] for dim in range(len(v.shape))]
    if len(call.outputs) > 1:
        call.give(1, [labels if dim == kept else None for dim, labels in enumerate(v.labels)])
    return list(v.labels)

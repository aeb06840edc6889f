"""Norms: their weight, bias and statistics belong to the channel; across channels, removing is not masking."""

from __future__ import annotations

import numpy as np

from nni_plugins.channels.call import Call
from nni_plugins.channels.labels import MaybeLabels
from nni_plugins.channels.rules.registry import rule

_ACROSS = "normalised across channels"


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
    affine = [call.tensor(1, "weight"), call.tensor(2, "bias")]
    for info in [*affine, call.tensor(3, "running_mean"), call.tensor(4, "running_var")]:
        if info is not None:
            if channels is None:
                channels = info.labels[0]
            call.tie(channels, info.labels[0])
    if x.labels[1] is None:
        call.freeze(channels, "the norm of something of fixed size")
    call.zero = affine[0] is not None
    call.size_of("num_features", channels)
    if channels is not None:
        call.size_of("num_features", np.unique(channels))  # an instance norm repeats its channels for each example
    for index in (1, 2):  # the saved mean and deviation, empty in some versions
        if index < len(call.outputs) and call.shape(index) == x.shape[1:2]:
            call.give(index, [x.labels[1]])
    return [x.labels[0], x.labels[1], *x.labels[2:]]


@rule("aten.native_layer_norm", "aten._fused_rms_norm", "aten.rms_norm")
def layer_norm(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    dims = len(call.value(1, "normalized_shape"))
    for labels in x.labels[-dims:]:
        call.inexact(labels, _ACROSS)
    for info in (call.tensor(2, "weight"), call.tensor(3, "bias")):
        if info is not None:
            for labels, other in zip(x.labels[-dims:], info.labels, strict=True):
                call.tie(labels, other)
    if dims == 1:
        call.size_of("normalized_shape", x.labels[-1])
    call.zero = call.tensor(2, "weight") is not None
    return list(x.labels)


@rule("aten.native_group_norm")
def group_norm(call: Call) -> list[MaybeLabels]:
    x, groups = call.inputs[0], int(call.value(6, "group", 1))
    channels = x.labels[1]
    for info in (call.tensor(1, "weight"), call.tensor(2, "bias")):
        if info is not None:
            call.tie(channels, info.labels[0])
    call.zero = call.tensor(1, "weight") is not None
    if channels is None:
        return list(x.labels)
    call.size_of("num_channels", channels)
    if groups == 1:
        call.inexact(channels, _ACROSS)
        return list(x.labels)
    group, inner = call.fresh(groups), call.fresh(len(channels) // groups)
    call.trace.labels.prefer(group)  # whole groups go exactly; channels in a group share statistics
    call.inexact(inner, _ACROSS)
    call.trace.labels.relate(channels, group, inner, call.because("group norm"))
    call.size_of("num_groups", group)
    for index in (1, 2):  # mean and deviation of each group
        if index < len(call.outputs) and call.shape(index)[-1:] == (groups,):
            call.give(index, [None, group])
    return list(x.labels)

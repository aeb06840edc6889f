"""Convolutions: plain, grouped, depthwise and transposed, in one to three dimensions."""

from __future__ import annotations

import math

from nni_plugins.channels.call import Call, Contraction, Info
from nni_plugins.channels.labels import Array, MaybeLabels
from nni_plugins.channels.rules.registry import rule


@rule("aten.convolution", "aten._convolution", "aten.convolution_overrideable", "aten.mkldnn_convolution")
def convolution(call: Call) -> list[MaybeLabels]:
    x, weight, bias = call.tensor(0, "input"), call.tensor(1, "weight"), call.tensor(2, "bias")
    assert x is not None and weight is not None
    padding = call.value(4, "padding", [0])
    transposed = bool(call.value(6, "transposed", False))
    groups = int(call.value(8, "groups", 1))
    for labels in x.labels[2:]:
        call.freeze(labels, "a convolution slides along it")
    for labels in weight.labels[2:]:
        call.freeze_silently(labels)
    rule_of = _transposed if transposed else _plain
    out = rule_of(call, x, weight, bias, groups, any(padding))
    if bias is not None:
        call.tie(bias.labels[0], out)
    call.size_of("in_channels", x.labels[1])
    call.size_of("out_channels", out)
    positions = math.prod((x.shape if transposed else call.shape())[2:])
    macs = x.shape[0] * positions * math.prod(weight.shape)
    call.costs(macs, *weight.labels[:2])
    call.zero = [x.zeros[0] and bias is None, weight.zeros[1 if transposed else 0], *[True] * (len(x.shape) - 2)]
    return [x.labels[0], out] + [None] * (len(x.shape) - 2)


@rule("aten.conv_tbc")
def conv_tbc(call: Call) -> list[MaybeLabels]:
    """A convolution along time of ``[time, batch, channel]``, with a weight ``[kernel, in, out]``."""
    x, weight, bias = call.inputs[:3]
    call.freeze(x.labels[0], "a convolution slides along it")
    call.freeze_silently(weight.labels[0])
    out = weight.labels[2]
    call.contract(x, 2, weight, 1, right_out=2, out_dim=2, bias=bias, padded=bool(call.value(3, "pad", 0)))
    call.tie(bias.labels[0], out)
    call.size_of("in_channels", weight.labels[1])
    call.size_of("out_channels", out)
    call.costs(math.prod(call.shape()[:2]) * math.prod(weight.shape), weight.labels[1], out)
    call.zero = [True, False, weight.zeros[2]]
    return [None, x.labels[1], out]


@rule("torchvision.deform_conv2d")
def deformed(call: Call) -> list[MaybeLabels]:
    """A convolution whose kernel positions are moved by offsets, which stay as they are."""
    x, weight, offset, mask, bias = call.inputs[:5]
    for info in (offset, mask):
        for labels in info.labels[1:]:
            call.freeze(labels, "each kernel position has offsets of its own")
    for labels in [*x.labels[2:], *weight.labels[2:]]:
        call.freeze(labels, "a convolution slides along it")
    groups = int(call.value(11, "groups", 1))
    out = _plain(call, x, weight, bias, groups, True)
    call.tie(bias.labels[0], out)
    if int(call.value(12, "offset_groups", 1)) > 1:
        call.freeze(x.labels[1], "groups of channels have offsets of their own")
    call.size_of("in_channels", x.labels[1])
    call.size_of("out_channels", out)
    call.costs(x.shape[0] * math.prod(call.shape()[2:]) * math.prod(weight.shape), *weight.labels[:2])
    call.zero = [False, weight.zeros[0], True, True]
    return [x.labels[0], out, None, None]


def _plain(call: Call, x: Info, weight: Info, bias: Info | None, groups: int, padded: bool) -> MaybeLabels:
    channels, inputs = x.labels[1], weight.labels[1]
    out = weight.labels[0]
    if groups == 1:
        call.contract(x, 1, weight, 1, right_out=0, out_dim=1, bias=bias, padded=padded)
        return out
    group = _groups_of(call, channels, x.shape[1], inputs, groups)
    _relate(call, out, group, groups, weight.shape[0] // groups)
    _note_groups(call, x, weight, group, groups, bias, padded, 1)
    return out


def _transposed(call: Call, x: Info, weight: Info, bias: Info | None, groups: int, padded: bool) -> MaybeLabels:
    if groups == 1:
        call.contract(x, 1, weight, 0, right_out=1, out_dim=1, bias=bias, padded=padded)
        return weight.labels[1]
    call.tie(x.labels[1], weight.labels[0])
    group = _groups_of(call, x.labels[1], x.shape[1], None, groups)
    outputs = weight.labels[1] if weight.labels[1] is not None else call.fresh(1)
    out = group if weight.shape[1] == 1 else call.trace.labels.merge(group, outputs, call.cause)
    _note_groups(call, x, weight, group, groups, bias, padded, 0)
    return out


def _groups_of(call: Call, channels: MaybeLabels, count: int, inputs: MaybeLabels, groups: int) -> Array:
    """Return the labels of the convolution's groups: its input channels are the pair (group, channel in the group)."""
    group = call.fresh(groups)
    inner = inputs if inputs is not None else call.fresh(count // groups)
    call.trace.labels.relate(channels, group, inner, call.because("the input of a grouped convolution is fixed"))
    return group


def _relate(call: Call, out: MaybeLabels, group: Array, groups: int, per_group: int) -> None:
    call.trace.labels.relate(out, group, call.fresh(per_group), call.because("grouped convolution"))


def _note_groups(
    call: Call, x: Info, weight: Info, group: MaybeLabels, groups: int, bias: Info | None, padded: bool, dim: int
) -> None:
    call.size_of("groups", group)
    if weight.shape[1] > 1:  # the input channels of a group are summed over
        call.trace.consumed.append(weight.labels[dim])
    call.contractions.append(
        Contraction(x, 1, weight, dim, 1 - dim, 1, groups=groups, weight=not weight.dynamic, bias=bias, padded=padded)
    )

"""Pooling, interpolation and padding: channels pass, and the window's dimensions are not to be pruned."""

from __future__ import annotations

import numpy as np

from nni_plugins.channels.call import Call
from nni_plugins.channels.labels import MaybeLabels
from nni_plugins.channels.rules.registry import rule

_SPATIAL = {
    1: "max_pool1d max_pool1d_with_indices avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d "
    "upsample_linear1d _upsample_nearest_exact1d reflection_pad1d replication_pad1d",
    2: "max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d "
    "fractional_max_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_lanczos2d_aa reflection_pad2d replication_pad2d "
    "mkldnn_adaptive_avg_pool2d mkldnn_max_pool2d lp_pool2d",
    3: "max_pool3d max_pool3d_with_indices avg_pool3d adaptive_avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d "
    "fractional_max_pool3d upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact3d reflection_pad3d "
    "replication_pad3d mkldnn_max_pool3d",
}


def _windowed(spatial: int):
    def windowed(call: Call) -> list[MaybeLabels]:
        x = call.inputs[0]
        for labels in x.labels[-spatial:]:
            call.freeze(labels, "a window slides along it")
        call.zero = x.zeros
        out: list[MaybeLabels] = [*x.labels[:-spatial], *[None] * spatial]
        for index in range(1, len(call.outputs)):
            call.give(index, list(out))
        return out

    return windowed


for _dims, _names in _SPATIAL.items():
    rule(*(f"aten.{name}" for name in _names.split()))(_windowed(_dims))


@rule("aten.max_unpool2d", "aten.max_unpool3d")
def max_unpool(call: Call) -> list[MaybeLabels]:
    """Values go back to where the largest were found, in a map of their own channel."""
    x, places = call.inputs[:2]
    spatial = 2 if call.cause.operator == "aten.max_unpool2d" else 3
    for a, b in zip(x.labels[:-spatial], places.labels[:-spatial], strict=True):
        call.tie(a, b)
    for labels in (*x.labels[-spatial:], *places.labels[-spatial:]):
        call.freeze(labels, "a window slides along it")
    call.zero = x.zeros
    return [*x.labels[:-spatial], *[None] * spatial]


@rule("aten.constant_pad_nd", "aten.pad")
def constant_pad(call: Call) -> list[MaybeLabels]:
    x, pads = call.inputs[0], list(call.value(1, "pad"))
    call.zero = x.zeros if call.value(2, "value", 0) in (0, None) else False
    out = list(x.labels)
    for back in range(len(pads) // 2):
        before, after = pads[2 * back], pads[2 * back + 1]
        labels = x.labels[-1 - back]
        if labels is None or not (before or after):
            continue
        if before < 0 or after < 0:
            call.freeze(labels, "cropped by a fixed amount")
            out[-1 - back] = None
            continue
        edge = call.fresh(before + after)
        call.freeze(edge, "padded by a fixed number of channels")
        out[-1 - back] = np.concatenate([edge[:before], labels, edge[before:]])
    return out

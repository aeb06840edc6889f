"""Between what the values of a tensor lie, as far as the operators of the run tell: a relu gives nothing negative."""

from __future__ import annotations

import math
from collections.abc import Mapping

from nni_plugins.channels.call import Info, Operator

Bounds = tuple[float, float]

ANYTHING = (-math.inf, math.inf)


def clamped_to(operator: Operator) -> Bounds:
    """Return between what a clamp leaves its input alone, and keeps its output; not numbers where that is not known."""
    low, high = {"aten.hardtanh": (-1, 1), "aten.relu6": (0, 6)}.get(operator.name.rstrip("_"), (None, None))
    name = operator.name.rstrip("_")
    if name in ("aten.clamp_min", "aten.clamp_max"):
        low, high = (operator.args[1], None) if name == "aten.clamp_min" else (None, operator.args[1])
    elif name != "aten.relu6":
        low, high = operator.argument(1, _LOW[name], low), operator.argument(2, _HIGH[name], high)
    if isinstance(low, Info) or isinstance(high, Info):
        return math.nan, math.nan
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


_LOW = {"aten.hardtanh": "min_val", "aten.clamp": "min"}
_HIGH = {"aten.hardtanh": "max_val", "aten.clamp": "max"}
_CLAMPS = frozenset(["aten.hardtanh", "aten.relu6", "aten.clamp", "aten.clamp_min", "aten.clamp_max"])


def bounds_of(operator: Operator, bounds: Mapping[Info, Bounds]) -> Bounds:
    """Return between what the values of the first output lie, given the bounds of the inputs."""
    name = operator.name.rstrip("_")
    short = name.removeprefix("aten.")
    inputs = [bounds.get(info, ANYTHING) for info in operator.inputs]
    least, most = inputs[0] if inputs else ANYTHING
    if short == "relu":
        return max(least, 0.0), max(most, 0.0)
    if name in _CLAMPS:
        low, high = clamped_to(operator)
        return (max(low, min(least, high)), min(high, max(most, low))) if low <= high else ANYTHING
    if short in _FROM_0_TO_1:
        return 0.0, 1.0
    if short in _POSITIVE:
        return 0.0, math.inf
    if short in _WITHIN:
        return least, most
    if short in _WITHIN_AND_ZERO:
        return min(least, 0.0), max(most, 0.0)
    if short in ("cat", "stack"):
        return min(low for low, _ in inputs), max(high for _, high in inputs)
    if short in ("add", "mul") and len(inputs) == 2 and least >= 0 and inputs[1][0] >= 0:
        return 0.0, math.inf
    if short in ("sum", "cumsum") and least >= 0:
        return 0.0, math.inf
    return ANYTHING


_FROM_0_TO_1 = frozenset("sigmoid hardsigmoid softmax _softmax _safe_softmax".split())
_POSITIVE = frozenset("exp abs square softplus".split())
_WITHIN = frozenset(
    (
        "clone detach alias contiguous expand view _unsafe_view reshape squeeze unsqueeze flatten permute transpose t "
        "slice select index index_select gather split split_with_sizes chunk unbind repeat roll flip unfold "
        "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices mean amax amin "
        "adaptive_max_pool2d pixel_shuffle pixel_unshuffle channel_shuffle _to_copy to upsample_nearest1d "
        "upsample_nearest2d upsample_nearest3d"
    ).split()
)
_WITHIN_AND_ZERO = frozenset(
    (
        "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
        "_adaptive_avg_pool2d _adaptive_avg_pool3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d dropout"
    ).split()
)

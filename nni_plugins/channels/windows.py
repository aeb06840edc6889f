"""How long a spatial dimension is after a convolution or a pool."""

from __future__ import annotations

from typing import Any

from nni_plugins.channels.call import Info, Operator

#: Kernel, stride, padding on both sides together, dilation, and 1 where the last window may hang over the end.
Window = tuple[int, int, int, int, int]

_POOLS = frozenset(
    f"aten.{name}{rank}d{more}"
    for name in ("max_pool", "avg_pool")
    for rank in (1, 2, 3)
    for more in ("", "_with_indices")
)


def window_of(operator: Operator, dim: int) -> Window | None:
    """Return the window that an operator slides along a dimension of its first argument, if it does."""
    x = operator.args[0]
    if operator.name == "aten.convolution":
        weight = operator.args[1]
        if not isinstance(x, Info) or dim < len(x.shape) - len(weight.shape) + 2 or operator.args[6]:
            return None
        i = dim - len(x.shape)
        stride, padding, dilation = (_at(operator.args[place], i) for place in (3, 4, 5))
        return weight.shape[i], stride, 2 * padding, dilation, 0
    if operator.name in _POOLS and isinstance(x, Info):
        rank = int(operator.name.partition("pool")[2][0])
        if dim < len(x.shape) - rank:
            return None
        i = dim - len(x.shape)
        kernel = _at(operator.args[1], i)
        stride = _at(operator.argument(2, "stride", None) or kernel, i)
        is_max = "max_pool" in operator.name
        dilation = _at(operator.argument(4, "dilation", 1), i) if is_max else 1
        over = operator.argument(5 if is_max else 4, "ceil_mode", False)
        return kernel, stride, 2 * _at(operator.argument(3, "padding", 0), i), dilation, int(over)
    return None


def _at(value: Any, index: int) -> int:
    if isinstance(value, (list, tuple)):
        return int(value[index] if len(value) > 1 else value[0])
    return int(value)

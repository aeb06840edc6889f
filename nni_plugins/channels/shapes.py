"""Shapes of the commonest operators' results, worked out directly.

torch has a "meta" kernel for every operator, but many are written in Python, and at their first use import torch's
compiler and sympy: one to two seconds, which a trial does not have. Those that nearly every network calls are here,
with the checks that a wrong size must meet. An operator that is not here, or a case that is not covered, is left to
torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Shape = Callable[..., Any]

#: Operator name (without ``aten.``) -> a function of its arguments that returns its result without data.
SHAPES: dict[str, Shape] = {}

_UNARY = (
    "relu sigmoid silu gelu hardswish hardsigmoid hardtanh leaky_relu elu selu celu tanh softplus mish exp log sqrt "
    "rsqrt abs neg square sin cos clamp erf reciprocal"
).split()


def shape_of(*names: str) -> Callable[[Shape], Shape]:
    """Register the shape of an operator."""

    def register(function: Shape) -> Shape:
        for name in names:
            SHAPES[name] = function
        return function

    return register


def result_without_data(name: str, args: tuple, kwargs: dict) -> Any:
    """Return the result of operator ``name`` (``'aten.relu'``), or NotImplemented where torch has to say.

    Raises
    ------
    RuntimeError
        If the sizes do not fit, as the operator itself would.
    """
    function = SHAPES.get(name.removeprefix("aten."))
    return NotImplemented if function is None else function(*args, **kwargs)


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _same_shape(x: torch.Tensor) -> torch.Tensor:
    if 0 in x.stride():  # expanded: the result is not
        return _like(x, list(x.shape))
    if not x.is_contiguous() and not _is_dense(x):  # every second of a row: the result is dense, in the same order
        order = sorted(range(x.dim()), key=lambda d: -x.stride()[d])
        return torch.empty_permuted(x.shape, order, dtype=x.dtype, device=x.device)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _is_dense(x: torch.Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _like(x: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """An empty tensor of ``shape``, laid out as ``x`` is."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if last and len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


@shape_of(*_UNARY)
def unary(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if not x.is_floating_point() or any(isinstance(a, torch.Tensor) for a in args):
        return NotImplemented
    return _same_shape(x)


@shape_of(*(f"{name}_" for name in _UNARY))
def unary_in_place(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return x


def broadcast(*shapes: tuple[int, ...]) -> list[int]:
    """Return the shape that ``shapes`` broadcast to."""
    out = [1] * max(map(len, shapes))
    for shape in shapes:
        for back, size in enumerate(reversed(shape), 1):
            if out[-back] == 1:
                out[-back] = size
            _need(size in (1, out[-back]), f"sizes {out[-back]} and {size} at dimension -{back} do not broadcast")
    return out


@shape_of("add", "sub", "mul", "div")
def binary(x: Any, y: Any, **kwargs: Any) -> Any:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or kwargs.get("rounding_mode"):
        return NotImplemented
    if not isinstance(y, torch.Tensor):
        return _same_shape(x)
    if y.dtype != x.dtype or not x.dim() or not y.dim():
        return NotImplemented
    if x.shape == y.shape:
        return _same_shape(x)
    return _like(x, broadcast(tuple(x.shape), tuple(y.shape)))


@shape_of("add_", "sub_", "mul_", "div_")
def binary_in_place(x: torch.Tensor, y: Any, **kwargs: Any) -> Any:
    if isinstance(y, torch.Tensor):
        _need(
            broadcast(tuple(x.shape), tuple(y.shape)) == list(x.shape),
            f"{tuple(y.shape)} does not fit into {tuple(x.shape)}",
        )
    return x


@shape_of("convolution")
def convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Any:
    spatial = weight.dim() - 2
    _need(x.dim() == weight.dim(), f"a weight of {weight.dim()} dimensions for an input of {x.dim()}")
    stride, padding, dilation, extra = (
        list(v) * (spatial if len(v) == 1 else 1) for v in (stride, padding, dilation, output_padding)
    )
    inputs = weight.shape[0] if transposed else weight.shape[1] * groups
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    _need(x.shape[1] == inputs, f"expected input to have {inputs} channels, but got {x.shape[1]}")
    _need(weight.shape[0] % groups == 0, f"{weight.shape[0]} channels are not divisible by {groups} groups")
    _need(bias is None or bias.shape == (outputs,), f"a bias for {outputs} channels")
    sizes = []
    for d in range(spatial):
        size, kernel = x.shape[2 + d], dilation[d] * (weight.shape[2 + d] - 1) + 1
        if transposed:
            sizes.append((size - 1) * stride[d] - 2 * padding[d] + kernel + extra[d])
        else:
            sizes.append((size + 2 * padding[d] - kernel) // stride[d] + 1)
    _need(all(size > 0 for size in sizes), f"the kernel is larger than the input {tuple(x.shape)}")
    return _like(x, [x.shape[0], outputs, *sizes])


@shape_of("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit")
def batch_norm(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    for tensor in args[:4]:
        if isinstance(tensor, torch.Tensor):
            _need(tensor.shape == x.shape[1:2], f"a norm of {tensor.shape[0]} channels for {x.shape[1]}")
    empty = x.new_empty(0)
    return _same_shape(x), empty, empty


@shape_of("mm")
def mm(a: torch.Tensor, b: torch.Tensor) -> Any:
    _need(a.shape[1] == b.shape[0], f"shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be multiplied")
    return a.new_empty(a.shape[0], b.shape[1])


@shape_of("addmm")
def addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **kwargs: Any) -> Any:
    out = mm(a, b)
    _need(broadcast(tuple(bias.shape), tuple(out.shape)) == list(out.shape), f"a bias of {tuple(bias.shape)}")
    return out


@shape_of("bmm")
def bmm(a: torch.Tensor, b: torch.Tensor) -> Any:
    _need(
        a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1],
        f"shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be multiplied",
    )
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


@shape_of("_grouped_mm")
def grouped_mm(a: torch.Tensor, b: torch.Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Torch's own knows two types of numbers only."""
    if a.dim() != 2 or b.dim() != 3 or offs is None:
        return NotImplemented
    _need(a.shape[1] == b.shape[1], f"shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be multiplied")
    _need(offs.shape == b.shape[:1], f"{b.shape[0]} matrices for {tuple(offs.shape)} groups of rows")
    return a.new_empty(a.shape[0], b.shape[2], dtype=out_dtype or a.dtype)


@shape_of("native_layer_norm")
def layer_norm(x: torch.Tensor, shape: list[int], *affine: Any) -> Any:
    dims, lead = len(shape), list(x.shape[: x.dim() - len(shape)])
    _need(list(x.shape[-dims:]) == list(shape), f"a norm over {list(shape)} of {tuple(x.shape)}")
    for tensor in affine[:2]:
        if isinstance(tensor, torch.Tensor):
            _need(list(tensor.shape) == list(shape), f"a norm over {list(shape)} with {tuple(tensor.shape)}")
    statistic = x.new_empty([*lead, *[1] * dims])
    return _same_shape(x), statistic, torch.empty_like(statistic)


@shape_of("_softmax", "_log_softmax", "_safe_softmax")
def softmax(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if not x.is_floating_point() or any(isinstance(a, torch.dtype) for a in args) or kwargs.get("dtype"):
        return NotImplemented
    return _like(x, list(x.shape))


@shape_of("tril", "triu", "roll", "flip")
def rearranged(x: torch.Tensor, *args: Any) -> Any:
    return _like(x, list(x.shape))


@shape_of("pow")
def power(x: Any, exponent: Any) -> Any:
    if not isinstance(x, torch.Tensor) or isinstance(exponent, torch.Tensor) or not x.is_floating_point():
        return NotImplemented
    return _same_shape(x)


@shape_of("mean", "sum", "amax", "amin")
def reduction(x: torch.Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    if not x.is_floating_point() or kwargs or not x.dim():
        return NotImplemented
    dims = {d % x.dim() for d in ([dim] if isinstance(dim, int) else dim or range(x.dim()))}
    return x.new_empty([1 if d in dims else s for d, s in enumerate(x.shape) if keepdim or d not in dims])


@shape_of("cat")
def cat(tensors: list[torch.Tensor], dim: int = 0) -> Any:
    first = tensors[0]
    if any(t.dtype != first.dtype or t.dim() != first.dim() or not t.dim() for t in tensors):
        return NotImplemented
    dim %= first.dim()
    for t in tensors:
        _need(
            all(d == dim or a == b for d, (a, b) in enumerate(zip(t.shape, first.shape, strict=True))),
            f"{tuple(t.shape)} cannot be joined to {tuple(first.shape)} along dimension {dim}",
        )
    return _like(first, [*first.shape[:dim], sum(t.shape[dim] for t in tensors), *first.shape[dim + 1 :]])


@shape_of("clone", "detach", "alias")
def same(x: torch.Tensor, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else _same_shape(x)


@shape_of("_cudnn_rnn")
def recurrent(
    x: torch.Tensor, weights: list[torch.Tensor], each: int, buffer: Any, h: torch.Tensor, c: Any, *more: Any
):
    """All layers of an LSTM, GRU or RNN: see ``aten::_cudnn_rnn``."""
    kind, hidden, projection, layers, _, _, _, both = more[:8]
    directions, gates, width = (2 if both else 1), (1, 1, 4, 3)[kind], projection or hidden
    inputs = x.shape[-1]
    for index in range(layers * directions):
        w_ih, w_hh, *rest = weights[index * each : (index + 1) * each]
        if index and index % directions == 0:
            inputs = width * directions
        wanted = [
            (gates * hidden, inputs),
            (gates * hidden, width),
            *[(gates * hidden,)] * (len(rest) - bool(projection)),
        ]
        for weight, shape in zip((w_ih, w_hh, *rest), wanted, strict=False):
            _need(tuple(weight.shape) == shape, f"a weight of {tuple(weight.shape)} where {shape} is needed")
        if projection:
            _need(tuple(rest[-1].shape) == (width, hidden), f"a projection of {tuple(rest[-1].shape)}")
    _need(h.shape[-1] == width and h.shape[0] == layers * directions, f"a state of {tuple(h.shape)} for {width} units")
    _need(c is None or c.shape[-1] == hidden, f"a cell state for {hidden} units")
    out = x.new_empty([*x.shape[:-1], width * directions])
    return out, torch.empty_like(h), None if c is None else torch.empty_like(c)

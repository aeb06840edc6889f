"""Pointwise operators: aligned dimensions are tied, broadcast ones are not, and what zeros become is worked out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nni_plugins.channels.call import Call, Info
from nni_plugins.channels.labels import MaybeLabels
from nni_plugins.channels.rules.registry import rule

#: Unary (and scalar) functions with f(0) = 0: a masked channel stays zero through them.
ZERO_PRESERVING = frozenset(
    (
        "abs absolute asin arcsin asinh atan arctan atanh angle ceil celu deg2rad elu erf erfinv expm1 fix floor "
        "floor_divide fmod frac gelu hardshrink hardswish leaky_relu log1p mish nan_to_num neg negative positive "
        "rad2deg relu relu6 remainder round rrelu_with_noise rrelu_with_noise_functional selu sgn sign silu sin sinh "
        "softshrink sqrt square tan tanh trunc conj_physical"
    ).split()
)
#: Functions of several tensors that are zero where all of them are.
_JOINTLY_ZERO = frozenset(
    "add sub rsub lerp maximum minimum fmax fmin hypot complex logical_or bitwise_or bitwise_xor where addcmul".split()
)

#: Pointwise operators that torch does not tag as such.
UNTAGGED = (
    "aten.hardswish aten.hardsigmoid aten.hardtanh aten.relu6 aten.elu aten.celu aten.selu aten.leaky_relu "
    "aten.softplus aten.mish aten.silu aten.gelu aten.log_sigmoid_forward aten.threshold aten.rrelu_with_noise "
    "aten.rrelu_with_noise_functional aten.clamp aten.relu aten.sigmoid aten.tanh aten.lerp aten.addcmul aten.addcdiv "
    "aten.logit aten.softshrink aten.hardshrink aten.where aten.masked_fill aten.floor_divide aten.complex aten.polar "
    "aten.smooth_l1_loss aten.huber_loss aten.isclose"
).split()


def aligned(call: Call, infos: list[Info], shape: tuple[int, ...]) -> list[MaybeLabels]:
    """Tie the dimensions of ``infos`` that meet under broadcasting, and return the labels of the result."""
    out: list[MaybeLabels] = []
    for back in range(len(shape), 0, -1):
        size = shape[-back]
        met = [i.labels[-back] for i in infos if len(i.shape) >= back and i.shape[-back] == size]
        if size > 1:
            for labels in met[1:]:
                call.tie(met[0], labels)
        out.append(next((labels for labels in met if labels is not None), None))
    return out


def zeros_of_a_product(infos: list[Info], shape: tuple[int, ...]) -> list[bool]:
    """Whether a product is zero where a unit is masked, for each dimension: one factor has it, and is zero there."""
    return [any(info.zero_along(back, shape[-back]) for info in infos) for back in range(len(shape), 0, -1)]


def zeros_of_a_sum(infos: list[Info], shape: tuple[int, ...]) -> list[bool]:
    """Whether a sum is: every summand has it, and is zero there."""
    return [all(info.zero_along(back, shape[-back]) for info in infos) for back in range(len(shape), 0, -1)]


@rule("pointwise", *UNTAGGED)
def pointwise(call: Call) -> list[MaybeLabels]:
    short = call.cause.operator.rpartition(".")[2]
    short = short[:-1] if short.endswith("_") else short
    out = aligned(call, [info for info in call.inputs if info.shape], call.shape())
    call.zero = _zeros(call, short)
    for index in range(1, len(call.outputs)):  # what the backward pass wants, of the same shape or empty
        if call.shape(index) == call.shape():
            call.give(index, list(out))
    return out


def _zeros(call: Call, short: str) -> list[bool]:
    shape = call.shape()
    if not call.inputs:
        return [False] * len(shape)  # of numbers alone: torch.div(16, 4, rounding_mode='trunc')
    first = call.inputs[0]
    if short in ("mul", "multiply"):
        return zeros_of_a_product(call.inputs, shape)
    if short in ("div", "divide", "true_divide"):
        if len(call.inputs) > 1:
            _look_at_divisor(call, call.inputs[1])
        return zeros_of_a_sum([first], shape)
    if short in ("reciprocal", "rsqrt", "log") or (short == "pow" and _at_most(call.value(1, "exponent"), -1e-9)):
        _look_at_divisor(call, first)
    if short in _JOINTLY_ZERO and not _shifts(call):
        return zeros_of_a_sum(call.inputs[1:] if short == "where" else call.inputs, shape)
    if _SPECIAL[short](call) if short in _SPECIAL else short in ZERO_PRESERVING:
        return zeros_of_a_sum([first], shape)
    return [False] * len(shape)


def _look_at_divisor(call: Call, divisor: Info) -> None:
    """What vanishes with a masked unit must not be divided by: 0/0 is no number."""
    for labels, zero in zip(divisor.labels, divisor.zeros, strict=True):
        if zero:
            call.divides(divisor, labels)


def _shifts(call: Call) -> bool:
    """Whether a number is added: x + 1."""
    if call.cause.operator.startswith(("aten.add", "aten.sub", "aten.rsub")) and len(call.inputs) == 1:
        return call.value(1, "other") != 0
    return False


def _bounds(low: str, high: str, at: int = 1) -> Callable[[Call], bool]:
    return lambda call: (
        (_missing(call, at, low) or _at_most(call.value(at, low, -1), 0))
        and (_missing(call, at + 1, high) or _at_most(0, call.value(at + 1, high, 1)))
    )


def _missing(call: Call, position: int, name: str) -> bool:
    return call.value(position, name) is None


def _at_most(a: Any, b: Any) -> bool:
    return isinstance(a, (int, float)) and isinstance(b, (int, float)) and a <= b


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


#: Functions whose other arguments say whether they map zero to zero.
_SPECIAL: dict[str, Callable[[Call], bool]] = {
    "hardtanh": _bounds("min_val", "max_val"),
    "clamp": _bounds("min", "max"),
    "clip": _bounds("min", "max"),
    "clamp_min": lambda call: _at_most(call.value(1, "min"), 0),
    "clamp_max": lambda call: _at_most(0, call.value(1, "max")),
    "pow": lambda call: _positive(call.value(1, "exponent")),
    "masked_fill": lambda call: len(call.inputs) == 2 and call.value(2, "value") == 0,
    "threshold": lambda call: call.value(2, "value") == 0 or _at_most(call.value(1, "threshold"), -1e-30),
    "_prelu_kernel": lambda call: True,
}


@rule("aten.prelu", "aten._prelu_kernel")
def prelu(call: Call) -> list[MaybeLabels]:
    x, weight = call.inputs[0], call.inputs[1]
    call.zero = x.zeros
    if call.cause.operator == "aten.prelu":
        if weight.shape and weight.shape[0] > 1:
            call.tie(x.labels[1], weight.labels[0])
            call.size_of("num_parameters", x.labels[1])
        return list(x.labels)
    out = aligned(call, [x, weight], call.shape())
    shared = [labels for labels, size in zip(weight.labels, weight.shape, strict=True) if size > 1]
    if shared:
        call.size_of("num_parameters", shared[0])
    return out


@rule("aten.bucketize", "aten.isin")
def by_value(call: Call) -> list[MaybeLabels]:
    """A function of each value, by a table that must stay."""
    first, *others = call.inputs
    for info in others:
        for labels in info.labels:
            call.freeze(labels, "a table of values")
    return list(first.labels) if len(first.labels) == len(call.shape()) else [None] * len(call.shape())

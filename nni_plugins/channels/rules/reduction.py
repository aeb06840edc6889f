"""Reductions, softmax and cumulative operators: what runs along a labelled dimension, and what it does to exactness."""

from __future__ import annotations

from nni_plugins.channels.call import Call
from nni_plugins.channels.labels import MaybeLabels
from nni_plugins.channels.rules.elementwise import aligned, zeros_of_a_sum
from nni_plugins.channels.rules.registry import rule


def _gone(dims: object, rank: int) -> set[int]:
    if dims is None or dims == [] or dims == ():
        return set(range(rank))
    return {d % rank for d in ([dims] if isinstance(dims, int) else list(dims))} if rank else set()  # type: ignore[call-overload]


def _reduced(call: Call, dims: object, keepdim: bool, *, exact: bool) -> list[MaybeLabels]:
    x = call.inputs[0]
    gone = _gone(dims, len(x.shape))
    for dim in gone:
        if exact:
            call.sum_over(x, dim)
        else:
            call.reduced(x, dim)
    if keepdim:
        return call.carry(x, [None if dim in gone else dim for dim in range(len(x.shape))])
    return call.carry(x, [dim for dim in range(len(x.shape)) if dim not in gone])


@rule("aten.sum", "aten.nansum")
def total(call: Call) -> list[MaybeLabels]:
    return _reduced(call, call.value(1, "dim"), bool(call.value(2, "keepdim", False)), exact=True)


#: Those of nothing but zeros is zero.
_ZERO = frozenset(f"aten.{name}" for name in "mean amax amin std var prod any all".split())


@rule(*_ZERO, "aten.logsumexp")
def statistic(call: Call) -> list[MaybeLabels]:
    labels = _statistic(call)
    if call.cause.operator not in _ZERO:
        call.zero = False
    return labels


def _statistic(call: Call) -> list[MaybeLabels]:
    overload = call.func._overloadname
    dims = call.value(1, "dim")
    if overload in ("default", "") and (isinstance(dims, bool) or not isinstance(dims, (list, tuple, int))):
        return _reduced(call, None, False, exact=False)
    position = {"correction": 3}.get(overload, 2)
    if call.cause.operator in ("aten.std", "aten.var") and overload == "dim":
        position = 3
    keepdim = bool(call.kwargs.get("keepdim", call.args[position] if len(call.args) > position else False))
    return _reduced(call, dims, keepdim, exact=False)


@rule("aten.var_mean", "aten.std_mean", "aten.aminmax")
def two_statistics(call: Call) -> list[MaybeLabels]:
    dims = call.value(1, "dim")
    keepdim = bool(call.value(3, "keepdim", False))
    labels = _reduced(call, None if isinstance(dims, bool) else dims, keepdim, exact=False)
    call.give(1, list(labels))
    return labels


@rule("aten.linalg_vector_norm", "aten.norm", "aten.native_norm", "aten.frobenius_norm")
def vector_norm(call: Call) -> list[MaybeLabels]:
    """Zeros add nothing to a norm, be it a sum of powers, a count or a largest value."""
    order = 2 if call.cause.operator == "aten.frobenius_norm" else call.value(1, "ord", call.value(1, "p", 2))
    at = 1 if call.cause.operator == "aten.frobenius_norm" else 2
    exact = order is None or (isinstance(order, (int, float)) and order >= 0)
    return _reduced(call, call.value(at, "dim"), bool(call.value(at + 1, "keepdim", False)), exact=exact)


@rule("aten.renorm")
def renorm(call: Call) -> list[MaybeLabels]:
    """Slices along one dimension are brought to a largest norm."""
    x, kept = call.inputs[0], int(call.value(2, "dim")) % len(call.inputs[0].shape)
    call.zero = x.zeros
    for dim in range(len(x.shape)):
        if dim != kept:
            call.sum_over(x, dim)
            call.mix(dim)
    return list(x.labels)


@rule("aten.max", "aten.min", "aten.median", "aten.mode", "aten.nanmedian", "aten.kthvalue")
def extreme(call: Call) -> list[MaybeLabels]:
    if call.func._overloadname == "other":  # the pointwise form
        call.zero = zeros_of_a_sum(call.inputs, call.shape())
        return aligned(call, [info for info in call.inputs if info.shape], call.shape())
    at = 2 if call.cause.operator == "aten.kthvalue" else 1
    dims = call.value(at, "dim", -1 if at == 2 else None)
    labels = _reduced(call, dims, bool(call.value(at + 1, "keepdim", False)), exact=False)
    for index in range(1, len(call.outputs)):
        call.give(index, list(labels))
    return labels


@rule("aten.argmax", "aten.argmin")
def place(call: Call) -> list[MaybeLabels]:
    """The number of an index: with others gone, it would count other things."""
    x = call.inputs[0]
    gone = _gone(call.value(1, "dim"), len(x.shape))
    for dim in gone:
        call.freeze(x.labels[dim], "its indices are counted")
    if call.value(2, "keepdim", False):
        return [None if dim in gone else labels for dim, labels in enumerate(x.labels)]
    return [labels for dim, labels in enumerate(x.labels) if dim not in gone]


@rule(
    "aten._softmax",
    "aten._log_softmax",
    "aten.softmax",
    "aten.log_softmax",
    "aten._safe_softmax",
    "aten._masked_softmax",
)
def softmax(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    masked = call.cause.operator == "aten._masked_softmax"
    dim = call.value(2 if masked else 1, "dim")
    dim = (-1 if dim is None else int(dim)) % max(len(x.shape), 1)
    if masked and len(call.inputs[1].shape) == len(x.shape):
        aligned(call, call.inputs[:2], call.shape())
    if x.labels:
        call.inexact(x.labels[dim], "normalised across channels")
        call.mix(dim)
    return list(x.labels)


@rule("aten.cumsum")
def cumsum(call: Call) -> list[MaybeLabels]:
    """A masked unit adds nothing to the sums after it, but the sum up to it is not zero."""
    x = call.inputs[0]
    if not x.shape:
        return []
    dim = int(call.value(1, "dim")) % len(x.shape)
    call.sum_over(x, dim)
    call.mix(dim)
    call.zero = [z and d != dim for d, z in enumerate(x.zeros)]
    return list(x.labels)


@rule(*(f"aten.{name}" for name in "cumprod sort topk argsort logcumsumexp _logcumsumexp cummax cummin".split()))
def ordered(call: Call) -> list[MaybeLabels]:
    """What depends on the order along a dimension, or on how many there are: the others pass."""
    x, operator = call.inputs[0], call.cause.operator
    out = list(x.labels)
    if not out:
        return out
    position = 2 if operator == "aten.topk" or call.func._overloadname == "stable" else 1
    dim = call.value(position, "dim")
    dim = (-1 if dim is None or isinstance(dim, bool) else int(dim)) % len(out)
    call.freeze(out[dim], "its order matters along it")
    out[dim] = None
    call.zero = x.zeros
    for index in range(1, len(call.outputs)):
        call.give(index, list(out))
    return out

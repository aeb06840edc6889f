"""Reductions, softmax and cumulative operators: what runs along a labelled dimension, and what it does to exactness."""

from __future__ import annotations

from nni_plugins.channels.call import Call
from nni_plugins.channels.labels import MaybeLabels
from nni_plugins.channels.rules.registry import rule


def _reduced(call: Call, dims: object, keepdim: bool, *, exact: bool) -> list[MaybeLabels]:
    x = call.inputs[0]
    rank = len(x.shape)
    if dims is None or dims == []:
        gone = set(range(rank))
    else:
        gone = {d % rank for d in ([dims] if isinstance(dims, int) else list(dims))} if rank else set()  # type: ignore[call-overload]
    for dim in gone:
        if exact:
            call.sum_over(x, dim)
        else:
            call.reduced(x, dim)
    kept = [None if dim in gone else labels for dim, labels in enumerate(x.labels)]
    if keepdim:
        return kept
    return [labels for dim, labels in enumerate(kept) if dim not in gone]


@rule("aten.sum")
def total(call: Call) -> list[MaybeLabels]:
    call.zero = call.inputs[0].zero
    return _reduced(call, call.value(1, "dim"), bool(call.value(2, "keepdim", False)), exact=True)


@rule(
    "aten.mean", "aten.amax", "aten.amin", "aten.logsumexp", "aten.std", "aten.var", "aten.prod", "aten.any", "aten.all"
)
def statistic(call: Call) -> list[MaybeLabels]:
    overload = call.func._overloadname
    call.zero = call.inputs[0].zero and call.cause.operator in ("aten.mean", "aten.amax", "aten.amin")
    if overload in ("default", "") and not isinstance(call.value(1, "dim"), (list, tuple, int)):
        return _reduced(call, None, False, exact=False)
    position = {"correction": 3}.get(overload, 2)
    if call.cause.operator in ("aten.std", "aten.var") and overload == "dim":
        position = 3
    keepdim = bool(call.kwargs.get("keepdim", call.args[position] if len(call.args) > position else False))
    return _reduced(call, call.value(1, "dim"), keepdim, exact=False)


@rule("aten.var_mean", "aten.std_mean")
def two_statistics(call: Call) -> list[MaybeLabels]:
    keepdim = bool(call.kwargs.get("keepdim", False))
    labels = _reduced(call, call.value(1, "dim"), keepdim, exact=False)
    call.give(1, list(labels))
    return labels


@rule("aten.linalg_vector_norm", "aten.norm")
def vector_norm(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    order = call.value(1, "ord", 2)
    dims = call.value(2, "dim")
    keepdim = bool(call.value(3, "keepdim", False))
    call.zero = x.zero
    exact = isinstance(order, (int, float)) and 0 < order < float("inf")
    return _reduced(call, dims, keepdim, exact=exact)


@rule("aten.max", "aten.min", "aten.median", "aten.mode", "aten.argmax", "aten.argmin")
def extreme(call: Call) -> list[MaybeLabels]:
    if len(call.inputs) == 2:  # the pointwise form
        from nni_plugins.channels.rules.elementwise import aligned

        return aligned(call, [info for info in call.inputs if info.shape], call.shape())
    call.zero = call.inputs[0].zero and "arg" not in call.cause.operator
    labels = _reduced(call, call.value(1, "dim"), bool(call.value(2, "keepdim", False)), exact=False)
    for index in range(1, len(call.outputs)):
        call.give(index, list(labels))
    return labels


@rule("aten._softmax", "aten._log_softmax", "aten.softmax", "aten.log_softmax", "aten._safe_softmax")
def softmax(call: Call) -> list[MaybeLabels]:
    x, dim = call.inputs[0], int(call.value(1, "dim"))
    call.inexact(x.labels[dim] if x.labels else None, "normalised across channels")
    return list(x.labels)


@rule("aten.cumsum", "aten.cumprod", "aten.sort", "aten.topk", "aten.flip", "aten.roll", "aten.logcumsumexp")
def ordered(call: Call) -> list[MaybeLabels]:
    """What depends on the order along a dimension: others pass."""
    x = call.inputs[0]
    default = -1 if call.cause.operator in ("aten.sort", "aten.topk") else None
    position = 2 if call.cause.operator in ("aten.topk", "aten.roll") else 1
    dims = call.value(position, "dims", call.value(position, "dim", default))
    rank = len(x.shape)
    along = range(rank) if dims in (None, []) else [d % rank for d in ([dims] if isinstance(dims, int) else dims)]
    out = list(x.labels)
    for dim in along:
        if isinstance(dim, int) and out:
            call.freeze(out[dim], "its order matters along it")
            out[dim] = None
    call.zero = x.zero
    for index in range(1, len(call.outputs)):
        call.give(index, list(out))
    return out

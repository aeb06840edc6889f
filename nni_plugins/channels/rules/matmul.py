"""Matrix products: linear layers, and products of activations."""

from __future__ import annotations

import math

from nni_plugins.channels.call import Call, Info
from nni_plugins.channels.labels import MaybeLabels
from nni_plugins.channels.rules.registry import rule


def _product(call: Call, a: Info, b: Info, bias: Info | None, batch: int) -> list[MaybeLabels]:
    """``a [..., m, k] @ b [..., k, n]``, with ``batch`` leading dimensions."""
    rows, inner, columns = batch, batch + 1, batch + 1
    if not a.dynamic and b.dynamic:  # a weight on the left: the same contraction, seen from the other side
        call.contract(b, batch, a, inner, right_out=rows, out_dim=rows, bias=bias)
    else:
        call.contract(a, inner, b, batch, right_out=columns, out_dim=columns, bias=bias)
    leading = []
    for dim in range(batch):
        call.tie(a.labels[dim], b.labels[dim])
        call.trace.labels.prefer(a.labels[dim])
        leading.append(a.labels[dim])
    call.costs(math.prod(a.shape) * b.shape[-1], *leading, a.labels[batch], a.labels[inner], b.labels[columns])
    call.zero = bool((a.labels[rows] is None or a.zero) and (b.labels[columns] is None or b.zero))
    return [*leading, a.labels[rows], b.labels[columns]]


def _linear_sizes(call: Call, out: list[MaybeLabels], contracted: MaybeLabels) -> None:
    call.size_of("in_features", contracted)
    call.size_of("out_features", out[-1])


@rule("aten.mm")
def mm(call: Call) -> list[MaybeLabels]:
    a, b = call.tensor(0, "self"), call.tensor(1, "mat2")
    assert a is not None and b is not None
    out = _product(call, a, b, None, 0)
    _linear_sizes(call, out, b.labels[0])
    return out


@rule("aten.addmm")
def addmm(call: Call) -> list[MaybeLabels]:
    bias, a, b = call.tensor(0, "self"), call.tensor(1, "mat1"), call.tensor(2, "mat2")
    assert bias is not None and a is not None and b is not None
    out = _product(call, a, b, bias, 0)
    call.tie(bias.labels[-1], out[-1])
    call.zero = call.zero and bias.zero
    _linear_sizes(call, out, b.labels[0])
    return out


@rule("aten.bmm")
def bmm(call: Call) -> list[MaybeLabels]:
    a, b = call.tensor(0, "self"), call.tensor(1, "mat2")
    assert a is not None and b is not None
    return _product(call, a, b, None, 1)


@rule("aten.baddbmm")
def baddbmm(call: Call) -> list[MaybeLabels]:
    added, a, b = call.tensor(0, "self"), call.tensor(1, "batch1"), call.tensor(2, "batch2")
    assert added is not None and a is not None and b is not None
    out = _product(call, a, b, None, 1)
    for labels, other, size, wanted in zip(out, added.labels, added.shape, call.shape(), strict=True):
        if size == wanted:
            call.tie(labels, other)
    call.zero = call.zero and added.zero
    return out


@rule("aten.addmv", "aten.mv", "aten.dot")
def matrix_vector(call: Call) -> list[MaybeLabels]:
    infos = [info for info in call.inputs if info.shape]
    vector, matrix = infos[-1], infos[-2]
    call.contract(matrix, len(matrix.shape) - 1, vector, 0)
    call.costs(math.prod(matrix.shape), *matrix.labels)
    out = list(matrix.labels[:-1])
    if len(infos) == 3:
        call.tie(infos[0].labels[-1], out[-1])
    return out


@rule("aten.linear")
def linear(call: Call) -> list[MaybeLabels]:
    x, weight, bias = call.tensor(0, "input"), call.tensor(1, "weight"), call.tensor(2, "bias")
    assert x is not None and weight is not None
    last = len(x.shape) - 1
    call.contract(x, last, weight, 1, right_out=0, out_dim=last, bias=bias)
    if bias is not None:
        call.tie(bias.labels[0], weight.labels[0])
    call.costs(math.prod(x.shape) * weight.shape[0], *x.labels[:-1], *weight.labels)
    call.zero = all(labels is None for labels in x.labels[:-1]) or x.zero
    out = [*x.labels[:-1], weight.labels[0]]
    _linear_sizes(call, out, weight.labels[1])
    return out

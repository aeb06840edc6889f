"""Matrix products: linear layers, and products of activations."""

from __future__ import annotations

import math

from nni_plugins.channels.call import Call, Contraction, Info
from nni_plugins.channels.labels import MaybeLabels
from nni_plugins.channels.rules.registry import rule


def product(call: Call, a: Info, b: Info, bias: Info | None, batch: int) -> list[MaybeLabels]:
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
    summed = _either(a.labels[inner], b.labels[batch])
    call.costs(math.prod(a.shape) * b.shape[-1], *leading, a.labels[batch], summed, b.labels[columns])
    call.zero = [*(a.zeros[d] or b.zeros[d] for d in range(batch)), a.zeros[rows], b.zeros[columns]]
    return [*leading, a.labels[rows], b.labels[columns]]


def _either(left: MaybeLabels, right: MaybeLabels) -> MaybeLabels:
    """What is summed over, by the side that still has labels: behind a frozen operator only the weight has."""
    return right if left is None else left


def add_to(call: Call, out: list[MaybeLabels], added: Info) -> None:
    """Tie what is added to a product to it."""
    for back, (labels, size) in enumerate(zip(reversed(added.labels), reversed(added.shape), strict=True), 1):
        if size > 1:
            call.tie(out[-back], labels)
    zeros = call.zero if isinstance(call.zero, list) else [call.zero] * len(out)
    call.zero = [zero and added.zero_along(len(out) - d, call.shape()[d]) for d, zero in enumerate(zeros)]


def linear_sizes(call: Call, out: list[MaybeLabels], contracted: MaybeLabels) -> None:
    call.size_of("in_features", contracted)
    call.size_of("out_features", out[-1])


@rule("aten.mm", "aten._int_mm")
def mm(call: Call) -> list[MaybeLabels]:
    a, b = call.inputs[0], call.inputs[1]
    out = product(call, a, b, None, 0)
    linear_sizes(call, out, b.labels[0])
    return out


@rule("aten.addmm", "aten._addmm_activation")
def addmm(call: Call) -> list[MaybeLabels]:
    bias, a, b = call.inputs[:3]
    out = product(call, a, b, bias, 0)
    add_to(call, out, bias)
    linear_sizes(call, out, b.labels[0])
    return out


@rule("aten.bmm")
def bmm(call: Call) -> list[MaybeLabels]:
    return product(call, call.inputs[0], call.inputs[1], None, 1)


@rule("aten.baddbmm")
def baddbmm(call: Call) -> list[MaybeLabels]:
    added, a, b = call.inputs[:3]
    out = product(call, a, b, None, 1)
    add_to(call, out, added)
    return out


@rule("aten.addbmm")
def addbmm(call: Call) -> list[MaybeLabels]:
    """A batch of products, summed over the batch."""
    added, a, b = call.inputs[:3]
    batch, *out = product(call, a, b, None, 1)
    call.zero = [a.zeros[1], b.zeros[2]]
    if batch is not None:
        call.inexact(None if a.zeros[0] or b.zeros[0] else batch, "a masked unit is not zero where it is summed over")
        call.contractions.append(Contraction(a, 0, b, 0))
    add_to(call, out, added)
    return out


@rule("aten.addmv", "aten.mv")
def matrix_vector(call: Call) -> list[MaybeLabels]:
    *added, matrix, vector = (info for info in call.inputs if info.shape)
    if vector.dynamic or not matrix.dynamic:
        call.contract(vector, 0, matrix, 1, right_out=0, out_dim=0, bias=added[0] if added else None)
    else:
        call.contract(matrix, 1, vector, 0)
    call.zero = [matrix.zeros[0]]
    call.costs(math.prod(matrix.shape), matrix.labels[0], _either(matrix.labels[1], vector.labels[0]))
    out = [matrix.labels[0]]
    if added:
        add_to(call, out, added[0])
    linear_sizes(call, out, matrix.labels[1])
    return out


@rule("aten.dot", "aten.vdot")
def dot(call: Call) -> list[MaybeLabels]:
    a, b = call.inputs[:2]
    call.tie(a.labels[0], b.labels[0])
    if not a.zeros[0] and not b.zeros[0]:
        call.inexact(a.labels[0], "a masked unit is not zero where it is summed over")
    call.contractions.append(Contraction(a, 0, b, 0))
    call.costs(math.prod(a.shape), _either(a.labels[0], b.labels[0]))
    return []


@rule("aten.addr", "aten.ger", "aten.outer")
def outer(call: Call) -> list[MaybeLabels]:
    """Every element of one vector times every one of the other, maybe added to a matrix."""
    *added, a, b = (info for info in call.inputs if info.shape)
    out = [a.labels[0], b.labels[0]]
    call.zero = [a.zeros[0], b.zeros[0]]
    if added:
        add_to(call, out, added[0])
    return out


@rule("aten.linear", "aten.mkldnn_linear", "aten._mkldnn_linear")
def linear(call: Call) -> list[MaybeLabels]:
    x, weight, bias = call.tensor(0, "input"), call.tensor(1, "weight"), call.tensor(2, "bias")
    assert x is not None and weight is not None
    last = len(x.shape) - 1
    call.contract(x, last, weight, 1, right_out=0, out_dim=last, bias=bias)
    call.costs(math.prod(x.shape) * weight.shape[0], *x.labels[:-1], *weight.labels)
    call.zero = [*x.zeros[:-1], weight.zeros[0]]
    out = [*x.labels[:-1], weight.labels[0]]
    if bias is not None:
        add_to(call, out, bias)
    linear_sizes(call, out, weight.labels[1])
    return out


#: A row in memory must be whole runs of 16 bytes; so many of the narrowest numbers, that a model may be moved to them.
_ROW = 8


@rule("aten._grouped_mm", "transformers.grouped_mm_fallback")
def grouped_mm(call: Call) -> list[MaybeLabels]:
    """Rows of one matrix, run by run, times one matrix of a batch each: the experts of a mixture."""
    a, b = call.inputs[0], call.inputs[1]
    if len(a.shape) != 2 or len(b.shape) != 3:
        for info in call.inputs:
            for labels in info.labels:
                call.freeze(labels, "groups of rows of both factors")
        return [None] * len(call.shape())
    call.freeze(b.labels[0], "each of the matrices has rows of its own")
    for info, tensor in zip((a, b), call.args, strict=False):
        for labels, stride in zip(info.labels, tensor.stride(), strict=True):
            if stride == min(tensor.stride()) and call.cause.operator == "aten._grouped_mm":
                call.multiple_of(labels, _ROW)
    call.contract(a, 1, b, 1, right_out=2, out_dim=1)
    call.costs(math.prod(a.shape) * b.shape[2], a.labels[0], a.labels[1], b.labels[2])
    call.zero = [a.zeros[0], b.zeros[2]]
    out = [a.labels[0], b.labels[2]]
    bias = call.tensor(3, "bias")
    if bias is not None:
        call.tie(bias.labels[-1], out[1])
        call.zero = [False, b.zeros[2] and bias.zeros[-1]]
    return out


@rule("aten._trilinear")
def trilinear(call: Call) -> list[MaybeLabels]:
    """A product of three tensors, with dimensions added to each, summed over some: ``nn.Bilinear``."""
    infos = call.inputs[:3]
    expanded = [{int(d) for d in call.value(3 + i, f"expand{i + 1}")} for i in range(3)]
    summed = {int(d) for d in call.value(6, "sumdim")}
    rank = len(infos[0].shape) + len(expanded[0])
    aligned: list[list[MaybeLabels]] = []
    places: list[dict[int, int]] = []
    for info, added in zip(infos, expanded, strict=True):
        place = dict(zip((d for d in range(rank) if d not in added), range(len(info.shape)), strict=True))
        places.append(place)
        aligned.append([info.labels[place[d]] if d in place else None for d in range(rank)])
    out: list[MaybeLabels] = []
    for d in range(rank):
        having = [i for i in range(3) if d in places[i]]
        for i in having[1:]:
            call.tie(aligned[having[0]][d], aligned[i][d])
        labels = next((aligned[i][d] for i in having if aligned[i][d] is not None), None)
        if d not in summed:
            out.append(labels)
            continue
        if not any(infos[i].zeros[places[i][d]] for i in having):
            call.inexact(labels, "a masked unit is not zero where it is summed over")
        _note_factors(call, infos, having, places, d)
    call.zero = [
        any(info.zeros[place[d]] for info, place in zip(infos, places, strict=True) if d in place)
        for d in range(rank)
        if d not in summed
    ]
    call.size_of("out_features", infos[1].labels[0])
    call.size_of("in1_features", infos[1].labels[1] if len(infos[1].shape) > 1 else None)
    call.size_of("in2_features", infos[1].labels[2] if len(infos[1].shape) > 2 else None)
    call.costs(math.prod(infos[0].shape) * math.prod(infos[1].shape[::2]), *infos[1].labels)
    return out


def _note_factors(call: Call, infos: list[Info], having: list[int], places: list[dict[int, int]], dim: int) -> None:
    """Note a sum over what two or three factors share; a weight among them is what consumes."""
    weights = [i for i in having if not infos[i].dynamic]
    lefts = [i for i in having if infos[i].dynamic] or weights[:1]
    for i in weights:
        call.trace.consumed.append(infos[i].labels[places[i][dim]])
    right = next((i for i in having if i != lefts[0]), None)
    left = infos[lefts[0]]
    if right is None:
        call.contractions.append(Contraction(left, places[lefts[0]][dim]))
    else:
        call.contractions.append(Contraction(left, places[lefts[0]][dim], infos[right], places[right][dim]))

"""Views: reshape carries labels through merges and splits; permutations permute them."""

from __future__ import annotations

import math

import numpy as np

from nni_plugins.channels.call import Call, Info
from nni_plugins.channels.labels import MaybeLabels
from nni_plugins.channels.rules.registry import rule

_VIEWS = "view _unsafe_view view_copy reshape _reshape_copy _reshape_alias _reshape_alias_copy _mkldnn_reshape"


@rule(*(f"aten.{name}" for name in _VIEWS.split()))
def view(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    if x.shape == call.shape():
        return call.carry(x, range(len(x.shape)))
    if math.prod(x.shape) != math.prod(call.shape()):  # seen as another type, of another size
        for labels in x.labels:
            call.freeze(labels, "seen as numbers of another size")
        return [None] * len(call.shape())
    return reshaped(call, x, call.shape())


def reshaped(call: Call, x: Info, new: tuple[int, ...]) -> list[MaybeLabels]:
    """Carry labels and zeros to shape ``new``, run by run of dimensions with equal products."""
    old = x.shape
    out: list[MaybeLabels] = []
    zeros: list[bool] = []
    if 0 in old:
        return _empty(call, x, new)
    i = j = 0
    while i < len(old) or j < len(new):
        first, second = i, j
        a = old[i] if i < len(old) else 1
        b = new[j] if j < len(new) else 1
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while a != b:
            if a < b:
                a *= old[i]
                i += 1
            else:
                b *= new[j]
                j += 1
        labels, zero = _run(call, x, slice(first, i), new[second:j])
        out += labels
        zeros += zero
    call.zero = zeros
    return out


def _empty(call: Call, x: Info, new: tuple[int, ...]) -> list[MaybeLabels]:
    """Nothing was there this time (no boxes were found): the other dimensions are taken as they would be for one."""
    one, target = tuple(size or 1 for size in x.shape), tuple(size or 1 for size in new)
    labels = [part if size else None for size, part in zip(x.shape, x.labels, strict=True)]
    if math.prod(one) == math.prod(target):
        return reshaped(call, Info(one, labels, x.dynamic, x.zeros), target)
    for part in labels:
        call.freeze(part, "reshaped while empty")
    return [None] * len(new)


def _run(call: Call, x: Info, run: slice, new: tuple[int, ...]) -> tuple[list[MaybeLabels], list[bool]]:
    old, labels, zeros = x.shape[run], x.labels[run], x.zeros[run]
    out: list[MaybeLabels] = [None] * len(new)
    asked = [zero for zero, part in zip(zeros, labels, strict=True) if part is not None]
    zero = [all(asked or zeros)] * len(new)
    if not asked or not new:
        return out, zero
    wide = [d for d, size in enumerate(old) if size > 1]
    target = [d for d, size in enumerate(new) if size > 1]
    if [old[d] for d in wide] == [new[d] for d in target]:  # only ones come or go
        for d, t in zip(wide, target, strict=True):
            out[t], zero[t] = labels[d], zeros[d]
        return out, zero
    whole = _merged(call, labels, old)
    if len(new) == 1:
        return [whole], zero
    return call.trace.labels.split(whole, new, call.because("cut where nothing can go alone")), zero


def _merged(call: Call, labels: list[MaybeLabels], sizes: tuple[int, ...]) -> np.ndarray:
    """Return the labels of dimensions flattened into one; a dimension without labels repeats the others'."""
    along = [d for d, part in enumerate(labels) if part is not None]
    table = labels[along[-1]]
    assert table is not None
    table = np.asarray(table)
    for d in reversed(along[:-1]):
        outer = labels[d]
        assert outer is not None
        table = call.trace.labels.merge(outer, table, call.because("flattened with another dimension"))
    shape = tuple(sizes[d] if d in along else 1 for d in range(len(sizes)))
    return np.ascontiguousarray(np.broadcast_to(table.reshape(shape), sizes)).reshape(-1)


@rule("aten.unsqueeze", "aten.unsqueeze_copy")
def unsqueeze(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    dim = int(call.value(1, "dim")) % (len(x.shape) + 1)
    return call.carry(x, [*range(dim), None, *range(dim, len(x.shape))])


@rule("aten.squeeze", "aten.squeeze_copy")
def squeeze(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    rank = len(x.shape)
    dims = call.value(1, "dim", list(range(rank)))
    gone = {d % rank for d in ([dims] if isinstance(dims, int) else dims) if x.shape[d] == 1} if rank else set()
    return call.carry(x, [d for d in range(rank) if d not in gone])


@rule("aten.permute", "aten.permute_copy")
def permute(call: Call) -> list[MaybeLabels]:
    return call.carry(call.inputs[0], call.value(1, "dims"))


@rule("aten.transpose", "aten.transpose_copy", "aten.swapaxes", "aten.swapdims", "aten._mkldnn_transpose")
def transpose(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    a, b = call.value(1, "dim0"), call.value(2, "dim1")
    places = list(range(len(x.shape)))
    if places:
        places[a], places[b] = places[b], places[a]
    return call.carry(x, places)


@rule("aten.t", "aten.t_copy")
def t(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    return call.carry(x, range(len(x.shape))[::-1])


@rule("aten.expand", "aten.expand_copy", "aten.broadcast_to")
def expand(call: Call) -> list[MaybeLabels]:
    """A dimension that is repeated from one may shrink with whatever it meets."""
    x, shape = call.inputs[0], call.shape()
    old = (*[1] * (len(shape) - len(x.shape)), *x.shape)
    return _grown(call, x, old, [new // size if size else 1 for new, size in zip(shape, old, strict=True)])


@rule("aten.repeat", "aten.tile")
def repeat(call: Call) -> list[MaybeLabels]:
    """So may one that is copied from one; several are copied together with their labels."""
    x, repeats = call.inputs[0], [int(r) for r in call.value(1, "repeats", call.value(1, "dims"))]
    rank = len(call.shape())
    return _grown(call, x, (*[1] * (rank - len(x.shape)), *x.shape), [*[1] * (rank - len(repeats)), *repeats])


def _grown(call: Call, x: Info, old: tuple[int, ...], counts: list[int]) -> list[MaybeLabels]:
    added = len(old) - len(x.shape)
    out: list[MaybeLabels] = []
    zeros = [True] * added + x.zeros
    for d, (size, count) in enumerate(zip(old, counts, strict=True)):
        labels = x.labels[d - added] if d >= added else None
        if count > 1 and size == 1:
            labels = call.fresh(count)
            zeros[d] = False  # of these, one is as good as the other: none is zero for being masked
        elif count > 1 and labels is not None:
            labels = np.tile(labels, count)
        out.append(labels)
    call.zero = zeros
    return out


@rule("aten.channel_shuffle", "aten.native_channel_shuffle")
def channel_shuffle(call: Call) -> list[MaybeLabels]:
    """Channels are the pair (group, channel in the group), and come out the other way round."""
    x, groups = call.inputs[0], int(call.value(1, "groups"))
    call.zero = x.zeros
    labels = x.labels[1]
    if labels is None or groups in (1, len(labels)):
        return list(x.labels)
    outer, inner = call.trace.labels.split(labels, (groups, len(labels) // groups), call.cause)
    if outer is None or inner is None:
        call.freeze(labels, "shuffled")
        return [x.labels[0], None, *x.labels[2:]]
    call.size_of("groups", outer)
    return [x.labels[0], call.trace.labels.merge(inner, outer, call.cause), *x.labels[2:]]


@rule("aten.as_strided", "aten.as_strided_copy")
def as_strided(call: Call) -> list[MaybeLabels]:
    """Other strides over the same shape (adaptive pooling asks for them) say nothing new; anything else is unknown."""
    x = call.inputs[0]
    if x.shape == call.shape():
        call.zero = x.zeros
        return list(x.labels)
    for labels in x.labels:
        call.freeze(labels, "seen through other strides")
    return [None] * len(call.shape())

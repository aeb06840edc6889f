"""Joining and taking apart: concatenation, stacking, splitting, slicing, indexing."""

from __future__ import annotations

import numpy as np

from nni_plugins.channels.call import Call
from nni_plugins.channels.labels import Array, MaybeLabels
from nni_plugins.channels.rules.registry import rule


@rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(call: Call) -> list[MaybeLabels]:
    infos = [info for info in call.inputs if info.shape != (0,)]
    rank = len(call.shape())
    dim = int(call.value(1, "dim", 0)) % rank
    out: list[MaybeLabels] = []
    for d in range(rank):
        parts = [info.labels[d] for info in infos]
        if d != dim:
            for labels in parts[1:]:
                call.tie(parts[0], labels)
            out.append(next((labels for labels in parts if labels is not None), None))
        elif all(labels is None for labels in parts):
            out.append(None)
        else:
            out.append(np.concatenate([_some(call, info.labels[d], info.shape[d]) for info in infos]))
    call.zero = all(info.zero or info.labels[dim] is None for info in infos)
    return out


def _some(call: Call, labels: MaybeLabels, size: int) -> Array:
    if labels is not None:
        return labels
    labels = call.fresh(size)
    call.freeze_silently(labels)
    return labels


@rule("aten.stack")
def stack(call: Call) -> list[MaybeLabels]:
    rank = len(call.shape())
    dim = int(call.value(1, "dim", 0)) % rank
    first, *rest = [info.labels for info in call.inputs]
    for labels in rest:
        for a, b in zip(first, labels, strict=True):
            call.tie(a, b)
    call.zero = all(info.zero for info in call.inputs)
    out = list(first)
    out.insert(dim, None)
    return out


@rule("aten.split", "aten.chunk", "aten.unsafe_split", "aten.unsafe_chunk", "aten.tensor_split")
def split(call: Call) -> list[MaybeLabels] | None:
    """Cut into equal parts. The module will do so again, so the parts must lose the same number: they are tied."""
    x = call.inputs[0]
    dim = int(call.value(2, "dim", 0)) % len(x.shape)
    labels = x.labels[dim]
    parts = _cut(call, x.labels, dim, [out.shape[dim] for out in call.outputs])
    if labels is not None:
        pieces = [part[dim] for part in parts]
        if len({len(piece) for piece in pieces if piece is not None}) == 1:
            for piece in pieces[1:]:
                call.tie(pieces[0], piece)
        else:
            call.freeze(labels, "cut into unequal parts")
    return parts[0]


@rule("aten.split_with_sizes", "aten.unsafe_split_with_sizes", "aten.split_with_sizes_copy")
def split_with_sizes(call: Call) -> list[MaybeLabels] | None:
    x = call.inputs[0]
    dim = int(call.value(2, "dim", 0)) % len(x.shape)
    sizes = [int(s) for s in call.value(1, "split_sizes")]
    parts = _cut(call, x.labels, dim, sizes)
    if x.labels[dim] is not None and len(set(sizes)) == 1:
        for part in parts[1:]:
            call.tie(parts[0][dim], part[dim])
    return parts[0]


@rule("aten.glu")
def glu(call: Call) -> list[MaybeLabels]:
    """The first half times the sigmoid of the second: both lose the same units."""
    x = call.inputs[0]
    dim = int(call.value(1, "dim", -1)) % len(x.shape)
    half = x.shape[dim] // 2
    call.zero = x.zero
    out = list(x.labels)
    labels = out[dim]
    if labels is not None:
        call.tie(labels[:half], labels[half:])
        out[dim] = labels[:half]
    return out


def _cut(call: Call, labels: list[MaybeLabels], dim: int, sizes: list[int]) -> list[list[MaybeLabels]]:
    call.zero = call.inputs[0].zero
    along, start, parts = labels[dim], 0, []
    for index, size in enumerate(sizes):
        part = list(labels)
        if along is not None:
            part[dim] = along[start : start + size]
        start += size
        call.give(index, part)
        parts.append(part)
    return parts


@rule("aten.unbind")
def unbind(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    dim = int(call.value(1, "dim", 0)) % len(x.shape)
    call.freeze(x.labels[dim], "taken apart one by one")
    labels = [part for d, part in enumerate(x.labels) if d != dim]
    call.zero = x.zero
    for index in range(1, len(call.outputs)):
        call.give(index, list(labels))
    return labels


@rule("aten.select")
def select(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    dim = int(call.value(1, "dim", 0)) % len(x.shape)
    call.freeze(x.labels[dim], "one index is taken by its number")
    call.zero = x.zero
    return [part for d, part in enumerate(x.labels) if d != dim]


@rule("aten.slice")
def slice_(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    dim = int(call.value(1, "dim", 0)) % len(x.shape)
    call.zero = x.zero
    out = list(x.labels)
    labels = x.labels[dim]
    if labels is None:
        return out
    size, taken = len(labels), call.shape()[dim]
    start, _, step = slice(call.value(2, "start"), call.value(3, "end"), call.value(4, "step", 1)).indices(size)
    out[dim] = labels[start : start + taken * step : step]
    if step == 1 and 0 < taken < size and size % taken == 0 and start % taken == 0 and size // taken <= 8:
        table = labels.reshape(-1, taken)  # x[:, :n // 2]: parts that must lose the same number
        for row in table[1:]:
            call.tie(table[0], row)
    return out


@rule("aten.index", "aten.index_select", "aten.gather", "aten.take_along_dim")
def index(call: Call) -> list[MaybeLabels]:
    """Indexing by tensors: the indexed dimensions must stay, and only for one index alone is it known what passes."""
    x = call.inputs[0]
    rank = len(call.shape())
    if call.cause.operator == "aten.index_select":
        dim = int(call.value(1, "dim")) % len(x.shape)
        call.freeze(x.labels[dim], "picked by index")
        return [None if d == dim else labels for d, labels in enumerate(x.labels)]
    if call.cause.operator == "aten.index":
        indices = list(call.value(1, "indices"))
        used = [d for d, i in enumerate(indices) if i is not None]
        for d in used:
            call.freeze(x.labels[d], "picked by index")
        if len(used) == 1:
            wide = indices[used[0]].dim()
            out = [*x.labels[: used[0]], *[None] * wide, *x.labels[used[0] + 1 :]]
            if len(out) == rank:
                return out
    for info in call.inputs:
        for labels in info.labels:
            call.freeze(labels, "picked by index")
    return [None] * rank

"""Joining and taking apart: concatenation, stacking, splitting, slicing."""

from __future__ import annotations

import numpy as np

from nni_plugins.channels.call import Call
from nni_plugins.channels.labels import Array, MaybeLabels
from nni_plugins.channels.rules.registry import rule


@rule("aten.cat", "aten.concat", "aten.concatenate", "aten._chunk_cat")
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
    call.zero = [all(info.zeros[d] or (d == dim and info.labels[d] is None) for info in infos) for d in range(rank)]
    return out


def _some(call: Call, labels: MaybeLabels, size: int) -> Array:
    if labels is not None:
        return labels
    labels = call.fresh(size)
    call.freeze_silently(labels)
    return labels


@rule("aten.stack", "aten._stack")
def stack(call: Call) -> list[MaybeLabels]:
    rank = len(call.shape())
    dim = int(call.value(1, "dim", 0)) % rank
    first, *rest = [info.labels for info in call.inputs]
    for labels in rest:
        for a, b in zip(first, labels, strict=True):
            call.tie(a, b)
    zeros = [all(info.zeros[d] for info in call.inputs) for d in range(len(first))]
    call.zero = [*zeros[:dim], True, *zeros[dim:]]
    return [*first[:dim], None, *first[dim:]]


@rule("aten.split", "aten.chunk", "aten.unsafe_split", "aten.unsafe_chunk", "aten.tensor_split", "aten.split_copy")
def split(call: Call) -> list[MaybeLabels] | None:
    """Cut into equal parts. The module will do so again, so the parts must lose the same number: they are tied.

    Where the last part is smaller, it is tied to as much of the others, so that cutting again makes as many parts.
    """
    x = call.inputs[0]
    dim = int(call.value(2, "dim", 0)) % len(x.shape)
    parts = _cut(call, x.labels, dim, [out.shape[dim] for out in call.outputs])
    first = parts[0][dim]
    if first is not None:
        for part in parts[1:]:
            labels = part[dim]
            assert labels is not None
            if len(labels) <= len(first):
                call.tie(first[: len(labels)], labels)
            else:
                call.freeze(x.labels[dim], "cut into unequal parts")
    return parts[0]


@rule("aten.split_with_sizes", "aten.unsafe_split_with_sizes", "aten.split_with_sizes_copy")
def split_with_sizes(call: Call) -> list[MaybeLabels] | None:
    """Cut at given sizes. Equal ones come from equal things, and are tied; of others each part may shrink alone."""
    x = call.inputs[0]
    dim = int(call.value(2, "dim", 0)) % len(x.shape)
    sizes = [int(s) for s in call.value(1, "split_sizes")]
    parts = _cut(call, x.labels, dim, sizes)
    if x.labels[dim] is not None and len(set(sizes)) == 1:
        for part in parts[1:]:
            call.tie(parts[0][dim], part[dim])
    return parts[0]


def _cut(call: Call, labels: list[MaybeLabels], dim: int, sizes: list[int]) -> list[list[MaybeLabels]]:
    call.zero = call.inputs[0].zeros
    along, start, parts = labels[dim], 0, []
    for index, size in enumerate(sizes):
        part = list(labels)
        if along is not None:
            part[dim] = along[start : start + size]
        start += size
        call.give(index, part)
        parts.append(part)
    return parts


@rule("aten.glu")
def glu(call: Call) -> list[MaybeLabels]:
    """The first half times the sigmoid of the second: both lose the same units."""
    x = call.inputs[0]
    dim = int(call.value(1, "dim", -1)) % len(x.shape)
    half = x.shape[dim] // 2
    call.zero = x.zeros
    out = list(x.labels)
    labels = out[dim]
    if labels is not None:
        call.tie(labels[:half], labels[half:])
        out[dim] = labels[:half]
    return out


@rule("aten.unbind", "aten.unbind_copy")
def unbind(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    dim = int(call.value(1, "dim", 0)) % len(x.shape)
    call.freeze(x.labels[dim], "taken apart one by one")
    labels = call.carry(x, [d for d in range(len(x.shape)) if d != dim])
    for index in range(1, len(call.outputs)):
        call.give(index, list(labels))
    return labels


@rule("aten.select", "aten.select_copy")
def select(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    dim = int(call.value(1, "dim", 0)) % len(x.shape)
    call.freeze(x.labels[dim], "one index is taken by its number")
    return call.carry(x, [d for d in range(len(x.shape)) if d != dim])


@rule("aten.slice", "aten.slice_copy", "aten.narrow_copy")
def slice_(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    dim = int(call.value(1, "dim", 0)) % len(x.shape)
    call.zero = x.zeros
    out = list(x.labels)
    labels = x.labels[dim]
    if labels is not None:
        start, end, step = call.value(2, "start"), call.value(3, "end"), call.value(4, "step", 1)
        if call.cause.operator == "aten.narrow_copy":
            end = start + end
        out[dim] = _slice(call, labels, call.shape()[dim], start, end, step)
    return out


def _slice(call: Call, labels: Array, taken: int, first: int | None, last: int | None, step: int) -> Array:
    """What is taken may shrink with its part of the whole; that the bounds follow is for a replay to find out."""
    size = len(labels)
    start, _, step = slice(first, last, step).indices(size)
    if step > 1:  # every other one: only whole runs can go, or what is taken would be others
        runs = labels[: size // step * step].reshape(-1, step)
        for column in runs.T[1:]:
            call.tie(runs[:, 0], column)
        if size % step:
            call.freeze(labels, "every so many are taken")
    elif 0 < taken < size and size % taken == 0 and start % taken == 0 and size // taken <= 8:
        table = labels.reshape(-1, taken)  # x[:, :n // 2]: parts that must lose the same number
        for row in table[1:]:
            call.tie(table[0], row)
    return labels[start : start + taken * step : step]


@rule("aten.slice_scatter", "aten.select_scatter", "aten.diagonal_scatter", "aten.as_strided_scatter")
def scattered(call: Call) -> list[MaybeLabels]:
    """A copy with a part exchanged."""
    x, part = call.inputs[0], call.inputs[1]
    call.zero = x.zeros if part.zero else False
    dims = int(call.value(2, "dim", 0)) % len(x.shape)
    if call.cause.operator == "aten.slice_scatter":
        into = list(x.labels)
        labels = into[dims]
        if labels is not None:
            first, last, step = call.value(3, "start"), call.value(4, "end"), call.value(5, "step", 1)
            into[dims] = _slice(call, labels, part.shape[dims], first, last, step)
    elif call.cause.operator == "aten.select_scatter":
        call.freeze(x.labels[dims], "one index is written by its number")
        into = [labels for d, labels in enumerate(x.labels) if d != dims]
    else:
        for labels in [*x.labels, *part.labels]:
            call.freeze(labels, "written along a diagonal or by strides")
        return list(x.labels)
    for a, b in zip(into, part.labels, strict=True):
        call.tie(a, b)
    return list(x.labels)


@rule("aten.flip", "aten.fliplr", "aten.flipud")
def flip(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    call.zero = x.zeros
    turned = {int(d) % len(x.shape) for d in call.value(1, "dims")}
    return [
        np.ascontiguousarray(labels[::-1]) if labels is not None and d in turned else labels
        for d, labels in enumerate(x.labels)
    ]


@rule("aten.roll")
def roll(call: Call) -> list[MaybeLabels]:
    """Along what is rolled by a number of places, those that are left would go to other places."""
    x, dims = call.inputs[0], call.value(2, "dims", [])
    call.zero = x.zeros
    out = list(x.labels)
    for dim in dims if dims else range(len(out)):
        call.freeze(out[dim], "rolled by a number of places")
        out[dim] = None
    return out


@rule("aten.rot90")
def rot90(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    call.zero = x.zeros
    out = list(x.labels)
    for dim in call.value(2, "dims", [0, 1]):
        call.freeze(out[dim], "turned by a right angle")
        out[dim] = None
    return out

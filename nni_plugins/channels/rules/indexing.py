"""Indexing by tensors: what is picked must stay, and every other dimension passes.

A table of a forward (relative position bias, token embedding) is picked from by rows; its columns (heads, channels) are
as prunable as those of any weight.
"""

from __future__ import annotations

import torch

from nni_plugins.channels.call import Call, Contraction, Info
from nni_plugins.channels.labels import MaybeLabels
from nni_plugins.channels.rules.elementwise import aligned, zeros_of_a_sum
from nni_plugins.channels.rules.registry import rule
from nni_plugins.channels.shapes import broadcast

_PICKED = "picked by index"


def _freeze(call: Call, info: Info, labels: MaybeLabels) -> None:
    """Freeze what is picked; the rows of a table that the model holds are nothing that anybody would want to prune."""
    if info.dynamic:
        call.freeze(labels, _PICKED)
    else:
        call.freeze_silently(labels)


def _freeze_all(call: Call, infos: list[Info], why: str) -> None:
    for info in infos:
        for labels in info.labels:
            call.freeze(labels, why)


# -- embeddings ----------------------------------------------------------------------------------------------------


@rule("aten.embedding", "aten._embedding_bag", "aten._embedding_bag_forward_only", "aten.embedding_bag")
def embedding(call: Call) -> list[MaybeLabels]:
    """Rows of a table: the product of a matrix with one 1 in each row, and the table."""
    weight, index = call.inputs[0], call.inputs[1]
    call.freeze_silently(weight.labels[0])
    columns = weight.labels[1]
    bag = call.cause.operator != "aten.embedding"
    if bag:
        _freeze_all(call, call.inputs[1:], "a list of indices")
    rows: list[MaybeLabels] = [None] if bag else list(index.labels)
    call.zero = [*(labels is None for labels in rows), weight.zeros[1]]
    call.size_of("embedding_dim", columns)
    picks = Info((weight.shape[0],), [None], dynamic=True)
    call.contractions.append(
        Contraction(picks, 0, weight, 0, right_out=1, out_dim=len(rows), weight=not weight.dynamic)
    )
    return [*rows, columns]


@rule("aten.embedding_renorm")
def embedding_renorm(call: Call) -> list[MaybeLabels]:
    """Rows are brought to a largest norm, in place, in the table itself: zeros add nothing to it."""
    weight = call.inputs[0]
    call.zero = weight.zeros
    return list(weight.labels)


# -- picking -------------------------------------------------------------------------------------------------------


@rule("aten.index_select")
def index_select(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    if not x.shape:
        return []
    dim = int(call.value(1, "dim")) % len(x.shape)
    _freeze(call, x, x.labels[dim])
    return call.carry(x, [None if d == dim else d for d in range(len(x.shape))])


@rule("aten.index", "aten._unsafe_index", "aten._unsafe_masked_index")
def index(call: Call) -> list[MaybeLabels]:
    masked = call.cause.operator == "aten._unsafe_masked_index"
    x = call.inputs[0]
    if masked:
        _freeze_all(call, call.inputs[1:2], _PICKED)
    out, zeros = _indexed(call, x, list(call.value(2 if masked else 1, "indices")))
    call.zero = zeros if not masked else False
    return out


def _indexed(call: Call, x: Info, indices: list[torch.Tensor | None]) -> tuple[list[MaybeLabels], list[bool]]:
    """Return the labels of ``x[indices]``, and whether it is zero along each of its dimensions."""
    used: list[int] = []
    dim = 0
    widest: list[tuple[int, ...]] = []
    pickers: list[Info] = []
    for tensor in indices:
        if tensor is None:
            dim += 1
            continue
        mask = tensor.dtype in (torch.bool, torch.uint8)
        taken = tensor.dim() if mask else 1
        used += range(dim, dim + taken)
        dim += taken
        info = call.trace.info(tensor)
        if mask:
            _freeze_all(call, [info], _PICKED)
            widest.append((-1,))
        else:
            pickers.append(info)
            widest.append(tuple(tensor.shape))
    for d in used:
        _freeze(call, x, x.labels[d])
    others = [d for d in range(len(x.labels)) if d not in used]
    rank = max((len(shape) for shape in widest), default=0)
    first = used[0] if used and used == list(range(used[0], used[-1] + 1)) else 0
    sizes = call.shape()[first : first + rank] if call.cause.operator in _READS else None
    along: list[MaybeLabels] = [None] * rank
    if pickers and (-1,) not in widest:
        along = aligned(call, pickers, sizes if sizes is not None else tuple(broadcast(*widest)))
    labels = [x.labels[d] for d in others]
    zeros = [x.zeros[d] for d in others]
    new = [made is None for made in along]
    return [*labels[:first], *along, *labels[first:]], [*zeros[:first], *new, *zeros[first:]]


_READS = frozenset(["aten.index", "aten._unsafe_index", "aten._unsafe_masked_index"])


@rule("aten.gather")
def gather(call: Call) -> list[MaybeLabels]:
    x, picks = call.inputs[0], call.inputs[1] if len(call.inputs) > 1 else call.inputs[0]
    if not x.shape or not picks.shape:
        return [None] * len(call.shape())
    dim = int(call.value(1, "dim")) % len(x.shape)
    _freeze(call, x, x.labels[dim])
    out = _beside(call, x, picks, dim)
    out[dim] = picks.labels[dim]
    call.zero = [z if d != dim else picks.labels[dim] is None for d, z in enumerate(x.zeros)]
    return out


def _beside(call: Call, x: Info, other: Info, dim: int) -> list[MaybeLabels]:
    """Tie, but for ``dim``, the dimensions of ``x`` to those of an index or source that covers their beginning."""
    out: list[MaybeLabels] = []
    for d, (labels, met) in enumerate(zip(x.labels, other.labels, strict=True)):
        size = other.shape[d]
        if d == dim:
            out.append(None)
        elif size == x.shape[d]:
            call.tie(labels, met)
            out.append(labels if labels is not None else met)
        else:
            call.freeze(labels, "a part of it is picked by index")
            call.freeze(met, "it picks a part of something")
            out.append(None)
    return out


@rule("aten.take", "aten.masked_select", "aten.put", "aten.nonzero", "aten.nonzero_static", "aten.argwhere")
def flattened(call: Call) -> list[MaybeLabels]:
    _freeze_all(call, call.inputs, "its elements are picked one by one")
    kept = call.cause.operator in ("aten.put", "aten.put_")
    return list(call.inputs[0].labels) if kept else [None] * len(call.shape())


_COUNTED = (
    "_unique _unique2 unique_dim unique_consecutive unique_dim_consecutive bincount histc histogram searchsorted "
    "multinomial count_nonzero repeat_interleave _is_all_true _is_any_true hash_tensor kthvalue nanmedian mode "
    "_pdist_forward dist"
)


@rule(*(f"aten.{name}" for name in _COUNTED.split()))
def looked_at(call: Call) -> list[MaybeLabels]:
    """What comes out depends on all values, and has a shape of its own."""
    _freeze_all(call, call.inputs, "all its values are looked at together")
    for number in range(1, len(call.outputs)):
        call.give(number, [None] * len(call.shape(number)))
    return [None] * len(call.shape())


# -- writing -------------------------------------------------------------------------------------------------------


@rule("aten.index_put", "aten._index_put_impl", "aten._unsafe_index_put", "aten._unsafe_masked_index_put_accumulate")
def index_put(call: Call) -> list[MaybeLabels]:
    masked = call.cause.operator == "aten._unsafe_masked_index_put_accumulate"
    x = call.inputs[0]
    value = call.tensor(3 if masked else 2, "values")
    assert value is not None
    into, _ = _indexed(call, x, list(call.value(2 if masked else 1, "indices")))
    _meet(call, into, value)
    call.zero = x.zeros if value.zero else False
    return list(x.labels)


def _meet(call: Call, into: list[MaybeLabels], value: Info) -> None:
    """Tie what is written to where it goes, from the last dimension on; one of size 1 is repeated."""
    for back, (labels, size) in enumerate(zip(reversed(value.labels), reversed(value.shape), strict=True), 1):
        if size > 1 and back <= len(into):
            call.tie(into[-back], labels)
        else:
            call.freeze(labels, _PICKED)


@rule("aten.scatter", "aten.scatter_add", "aten.scatter_reduce")
def scatter(call: Call) -> list[MaybeLabels]:
    x, picks = call.inputs[0], call.tensor(2, "index")
    source = call.tensor(3, "src")
    if picks is None or not x.shape or not picks.shape:
        return list(x.labels)
    dim = int(call.value(1, "dim")) % len(x.shape)
    for info in (x, picks, source):
        if info is not None and info.shape:
            _freeze(call, info, info.labels[dim])
    _beside(call, x, picks, dim)
    if source is not None and source.shape:
        _beside(call, source, picks, dim)
    value = call.value(3, "value")
    call.zero = _both(x, source, dim) if source is not None and source.shape else (x.zeros if value == 0 else False)
    return list(x.labels)


@rule("aten.index_add", "aten.index_copy", "aten.index_reduce", "aten.index_fill")
def index_add(call: Call) -> list[MaybeLabels]:
    x, source = call.inputs[0], call.tensor(3, "source")
    if not x.shape:
        return []
    dim = int(call.value(1, "dim")) % len(x.shape)
    _freeze(call, x, x.labels[dim])
    if source is None or len(source.shape) != len(x.shape):
        call.zero = x.zeros if call.value(3, "value") == 0 else False
        return list(x.labels)
    for d, (labels, met) in enumerate(zip(x.labels, source.labels, strict=True)):
        if d == dim:
            call.freeze(met, _PICKED)
        else:
            call.tie(labels, met)
    call.zero = _both(x, source, dim)
    return list(x.labels)


def _both(x: Info, source: Info, written: int) -> list[bool]:
    """Zeros stay where both have them, but for the dimension along which values are written anywhere."""
    return [a and b and d != written for d, (a, b) in enumerate(zip(x.zeros, source.zeros, strict=True))]


@rule("aten.masked_scatter")
def masked_scatter(call: Call) -> list[MaybeLabels]:
    """Values go in order to where a mask says. Whole rows do if the mask is one for all of a row (was expanded)."""
    x, source = call.inputs[0], call.inputs[-1]
    mask = call.value(1, "mask")
    whole = mask.dim() > 0 and (mask.stride(-1) == 0 or mask.shape[-1] == 1)
    rows = whole and len(source.shape) > 1 and source.shape[-1] == x.shape[-1] == call.shape()[-1]
    keep = 1 if rows else 0
    for info in call.inputs:
        for labels in info.labels[: len(info.labels) - keep]:
            call.freeze(labels, "its elements are written one by one")
    if not rows:
        return [None] * len(call.shape())
    call.tie(x.labels[-1], source.labels[-1])
    mask_labels = call.trace.info(mask).labels
    if mask.shape[-1] > 1:
        call.tie(x.labels[-1], mask_labels[-1])
    call.zero = zeros_of_a_sum([x, source], call.shape())
    return [*[None] * (len(call.shape()) - 1), x.labels[-1]]


# -- diagonals and triangles -----------------------------------------------------------------------------------------


@rule("aten.tril", "aten.triu")
def triangle(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    call.zero = x.zeros
    for labels in x.labels[-2:]:
        call.freeze(labels, "a triangle is cut from it")
    return list(x.labels)


@rule("aten.diagonal", "aten.diagonal_copy", "aten.trace", "aten.diag")
def diagonal(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    dims = {int(call.value(2, "dim1", 0)) % len(x.shape), int(call.value(3, "dim2", 1)) % len(x.shape)}
    for dim in dims:
        call.freeze(x.labels[dim], "its diagonal is taken")
    rest: list[int | None] = [d for d in range(len(x.shape)) if d not in dims]
    return call.carry(x, [*rest, None] if len(call.shape()) > len(rest) else rest)


@rule("aten.diag_embed", "aten.block_diag")
def diag_embed(call: Call) -> list[MaybeLabels]:
    _freeze_all(call, call.inputs, "it becomes a diagonal")
    return [None] * len(call.shape())

"""Windows, sampling, spectra, complex views, matrices, distances: what runs along other dimensions than channels."""

from __future__ import annotations

import math

import numpy as np

from nni_plugins.channels.call import Call, Contraction
from nni_plugins.channels.labels import MaybeLabels
from nni_plugins.channels.rules.registry import rule


def _freeze(call: Call, labels: list[MaybeLabels], why: str) -> None:
    for part in labels:
        call.freeze(part, why)


# -- windows -------------------------------------------------------------------------------------------------------


@rule("aten.unfold", "aten.unfold_copy")
def unfold(call: Call) -> list[MaybeLabels]:
    """Windows along one dimension, each a new dimension at the end."""
    x = call.inputs[0]
    if not x.shape:
        return [None]
    dim = int(call.value(1, "dimension")) % len(x.shape)
    call.freeze(x.labels[dim], "a window slides along it")
    return call.carry(x, [*(None if d == dim else d for d in range(len(x.shape))), None])


@rule("aten.im2col")
def im2col(call: Call) -> list[MaybeLabels]:
    """Each channel becomes as many as the window has positions."""
    x = call.inputs[0]
    call.zero = x.zeros
    _freeze(call, x.labels[-2:], "a window slides along it")
    labels, positions = x.labels[-3], math.prod(call.value(1, "kernel_size"))
    return [*x.labels[:-3], None if labels is None else np.repeat(labels, positions), None]


@rule("aten.col2im")
def col2im(call: Call) -> list[MaybeLabels]:
    """Channels are the pair (channel, position in the window), and a channel's positions are added up."""
    x = call.inputs[0]
    call.zero = x.zeros
    call.freeze(x.labels[-1], "windows are put in their places along it")
    return [*x.labels[:-2], _blocks(call, x.labels[-2], math.prod(call.value(2, "kernel_size"))), None, None]


def _blocks(call: Call, labels: MaybeLabels, positions: int) -> MaybeLabels:
    """Tie runs of ``positions`` labels, which come to one index, and return one of each."""
    if labels is None:
        return None
    table = labels.reshape(-1, positions)
    for column in table.T[1:]:
        call.tie(table[:, 0], column)
    if len(table) == 1:  # all of them are one channel, which cannot go
        call.freeze(labels, "all come to one channel")
        return None
    return np.ascontiguousarray(table[:, 0])


@rule("aten.pixel_shuffle")
def pixel_shuffle(call: Call) -> list[MaybeLabels]:
    """Channels are the pair (channel, position in the block); only the channel can go."""
    x = call.inputs[0]
    call.zero = x.zeros
    _freeze(call, x.labels[-2:], "pixels move along it")
    return [*x.labels[:-3], _blocks(call, x.labels[-3], x.shape[-3] // call.shape()[-3]), None, None]


@rule("aten.pixel_unshuffle")
def pixel_unshuffle(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    call.zero = x.zeros
    _freeze(call, x.labels[-2:], "pixels move along it")
    labels, positions = x.labels[-3], call.shape()[-3] // x.shape[-3]
    return [*x.labels[:-3], None if labels is None else np.repeat(labels, positions), None, None]


# -- sampling ------------------------------------------------------------------------------------------------------


@rule("aten.grid_sampler_2d", "aten.grid_sampler_3d", "aten.cudnn_grid_sampler", "aten._grid_sampler_2d_cpu_fallback")
def grid_sampler(call: Call) -> list[MaybeLabels]:
    x, grid = call.inputs[:2]
    call.zero = x.zeros
    _freeze(call, x.labels[2:], "it is sampled along it")
    _freeze(call, grid.labels[1:], "it says where to sample")
    call.tie(x.labels[0], grid.labels[0])
    return [x.labels[0], x.labels[1], *[None] * (len(x.shape) - 2)]


@rule("aten.affine_grid_generator", "aten.cudnn_affine_grid_generator")
def affine_grid(call: Call) -> list[MaybeLabels]:
    theta = call.inputs[0]
    _freeze(call, theta.labels[1:], "it says where to sample")
    return [theta.labels[0], *[None] * (len(call.shape()) - 1)]


@rule("torchvision.roi_align", "torchvision.roi_pool")
def regions(call: Call) -> list[MaybeLabels]:
    x, boxes = call.inputs[:2]
    call.zero = x.zeros
    _freeze(call, [x.labels[0], *x.labels[2:], *boxes.labels], "boxes are cut from it")
    if len(call.outputs) > 1:
        call.give(1, [None, x.labels[1], None, None])
    return [None, x.labels[1], None, None]


@rule("torchvision.nms", "torchvision.ps_roi_align", "torchvision.ps_roi_pool")
def boxes_only(call: Call) -> list[MaybeLabels]:
    for info in call.inputs:
        _freeze(call, info.labels, "boxes, and channels that each have a place")
    for index in range(1, len(call.outputs)):
        call.give(index, [None] * len(call.shape(index)))
    return [None] * len(call.shape())


# -- spectra and complex numbers -----------------------------------------------------------------------------------


@rule("aten._fft_c2c", "aten._fft_r2c", "aten._fft_c2r")
def fft(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    call.zero = x.zeros
    out = list(x.labels)
    for dim in call.value(1, "dim"):
        call.freeze(out[dim], "a Fourier transform runs along it")
        out[dim] = None
    return out


@rule("aten.view_as_real", "aten.view_as_real_copy")
def view_as_real(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    return call.carry(x, [*range(len(x.shape)), None])


@rule("aten.view_as_complex", "aten.view_as_complex_copy")
def view_as_complex(call: Call) -> list[MaybeLabels]:
    x = call.inputs[0]
    call.freeze(x.labels[-1], "real and imaginary parts")
    return call.carry(x, range(len(x.shape) - 1))


@rule("aten.real", "aten.imag")
def part(call: Call) -> list[MaybeLabels]:
    return call.carry(call.inputs[0], range(len(call.shape())))


@rule("aten.linalg_cross")
def cross(call: Call) -> list[MaybeLabels]:
    x, y = call.inputs[:2]
    for a, b in zip(x.labels, y.labels, strict=True):
        call.tie(a, b)
    dim = int(call.kwargs.get("dim", -1)) % len(x.shape)
    call.freeze(x.labels[dim], "its three indices are crossed")
    call.zero = [a and b for a, b in zip(x.zeros, y.zeros, strict=True)]
    return list(x.labels)


# -- matrices ------------------------------------------------------------------------------------------------------

_MATRICES = (
    "linalg_inv_ex inverse linalg_cholesky_ex cholesky cholesky_inverse cholesky_solve linalg_lu linalg_lu_factor_ex "
    "linalg_lu_solve _linalg_solve_ex linalg_solve_triangular triangular_solve _linalg_det _linalg_slogdet "
    "_linalg_svd _linalg_eigh linalg_eig linalg_qr linalg_matrix_exp linalg_pinv linalg_householder_product "
    "linalg_lstsq lu_unpack"
)


@rule(*(f"aten.{name}" for name in _MATRICES.split()))
def matrices(call: Call) -> list[MaybeLabels]:
    """Functions of whole matrices: rows and columns must stay, what lies before them passes."""
    lead = list(call.inputs[0].labels[:-2])
    for info in call.inputs:
        _freeze(call, info.labels[-2:], "a function of the whole matrix")
        for a, b in zip(lead, info.labels[: len(lead)], strict=False):
            call.tie(a, b)
    for index in range(1, len(call.outputs)):
        call.give(index, _filled(lead, len(call.shape(index))))
    return _filled(lead, len(call.shape()))


def _filled(lead: list[MaybeLabels], rank: int) -> list[MaybeLabels]:
    return [*lead[:rank], *[None] * (rank - len(lead))]


@rule("aten._cdist_forward", "aten._euclidean_dist")
def distances(call: Call) -> list[MaybeLabels]:
    """Between every row of one and every row of the other: what is zero in both adds nothing."""
    a, b = call.inputs[:2]
    rank = len(call.shape())
    call.tie(a.labels[-1], b.labels[-1])
    if not (a.zeros[-1] and b.zeros[-1]):
        call.inexact(a.labels[-1], "a masked unit is not zero where distances are summed")
    for info in (a, b):
        if info.labels[-1] is not None:
            call.contractions.append(Contraction(info, len(info.shape) - 1))
        if not info.dynamic:
            call.trace.consumed.append(info.labels[-1])
    lead: list[MaybeLabels] = []
    for back in range(rank, 2, -1):
        met = [info.along(back, call.shape()[-back]) for info in (a, b) if len(info.shape) >= back]
        if len(met) == 2 and a.shape[-back] == b.shape[-back]:
            call.tie(met[0], met[1])
        lead.append(next((labels for labels in met if labels is not None), None))
    call.costs(math.prod(a.shape) * b.shape[-2], *lead, a.labels[-2], b.labels[-2], a.labels[-1])
    return [*lead, a.labels[-2], b.labels[-2]]


@rule("aten.cosine_similarity")
def cosine(call: Call) -> list[MaybeLabels]:
    a, b = call.inputs[:2]
    dim = int(call.value(2, "dim", 1)) % len(a.shape)
    for x, y in zip(a.labels, b.labels, strict=True):
        call.tie(x, y)
    call.sum_over(a, dim)
    call.sum_over(b, dim)
    return [labels for d, labels in enumerate(a.labels) if d != dim]


@rule("aten._pack_padded_sequence")
def packed(call: Call) -> list[MaybeLabels]:
    """Steps of all examples in one dimension, and how many examples each step has."""
    x, lengths = call.inputs[:2]
    _freeze(call, [*x.labels[:2], *lengths.labels], "packed by lengths")
    call.give(1, [None])
    return call.carry(x, [None, *range(2, len(x.shape))])

"""Recurrent layers: a hidden unit is a row of every gate, a column of the recurrent weight, and all that reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nni_plugins.channels.call import Call, Contraction, Info
from nni_plugins.channels.labels import Array, MaybeLabels
from nni_plugins.channels.rules.registry import rule

#: cuDNN's numbers of the kinds of cells -> how many gates each has: ReLU, tanh, LSTM, GRU.
_GATES = {0: 1, 1: 1, 2: 4, 3: 3}


@dataclass(frozen=True)
class _Cell:
    """The weights of one layer in one direction."""

    inputs: Info
    hidden: Info
    biases: tuple[Info, ...]
    projection: Info | None = None


@rule("aten.mkldnn_rnn_layer")
def one_layer(call: Call) -> list[MaybeLabels]:
    """``(x [time, batch, in], weights, h, c, ...)`` -> output, h, c: one layer of an LSTM in one direction."""
    x, w_ih, w_hh, b_ih, b_hh, h, c = call.inputs[:7]
    biases = (b_ih, b_hh) if call.value(12, "has_biases", True) else ()
    first = (call.module, "hidden_size") not in call.trace.sizes
    out = _cell(call, x, _Cell(w_ih, w_hh, biases), _GATES[int(call.value(9, "mode", 2))], [h], [c])
    if first:
        call.size_of("input_size", x.labels[-1])
    call.zero = [*x.zeros[:-1], h.zeros[-1] and c.zeros[-1]]
    for index in (1, 2):
        call.give(index, [*[None] * (len(call.shape(index)) - 1), out])
    return [*x.labels[:-1], out]


@rule("aten._cudnn_rnn", "aten.miopen_rnn")
def whole(call: Call) -> list[MaybeLabels]:
    """All layers and directions of an ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU``, which has one hidden size for them all."""
    cudnn = call.cause.operator == "aten._cudnn_rnn"
    info = call.trace.info
    x, h = info(call.args[0]), info(call.args[4 if cudnn else 3])
    c = call.tensor(5 if cudnn else 4)
    gates = _GATES[int(call.args[6 if cudnn else 5])]
    layers, directions = (int(call.args[9 if cudnn else 7]), 2 if call.args[13 if cudnn else 11] else 1)
    weights = [info(tensor) for tensor in call.args[1]]
    stride = len(weights) // (layers * directions)
    call.size_of("input_size", x.labels[-1])
    before = x
    out: MaybeLabels = None
    for layer in range(layers):
        made = []
        for direction in range(directions):
            start = (layer * directions + direction) * stride
            cell = _unpack(weights[start : start + stride])
            made.append(_cell(call, before, cell, gates, [h], [c] if c else []))
        out = None if any(labels is None for labels in made) else np.concatenate(made)  # type: ignore[arg-type]
        width = sum(weights[(layer * directions + d) * stride + 1].shape[1] for d in range(directions))
        before = Info((*x.shape[:-1], width), [*x.labels[:-1], out], dynamic=True, zero=h.zeros[-1])
    call.zero = [*[False] * (len(x.shape) - 1), h.zeros[-1] and (c is None or c.zeros[-1])]
    for index, state in ((1, h), (2, c)):
        if state is not None and index < len(call.outputs) and call.shape(index) == state.shape:
            call.give(index, list(state.labels))
    return [*x.labels[:-1], out]


def _unpack(weights: list[Info]) -> _Cell:
    """``w_ih, w_hh[, b_ih, b_hh][, w_hr]``."""
    w_ih, w_hh, *rest = weights
    projection = rest.pop() if len(rest) in (1, 3) else None
    return _Cell(w_ih, w_hh, tuple(rest), projection)


def _cell(
    call: Call, x: Info, cell: _Cell, gates: int, hidden_states: list[Info], cell_states: list[Info]
) -> MaybeLabels:
    """Tie what belongs to a hidden unit, note who reads it, and return the labels of what comes out."""
    size = cell.hidden.shape[0] // gates
    units: MaybeLabels = call.fresh(size) if size > 1 else None
    rows = [cell.inputs.labels[0], cell.hidden.labels[0], *(bias.labels[0] for bias in cell.biases)]
    for labels in rows:
        _tie_gates(call, labels, units, gates)
    out = units
    if cell.projection is not None:
        call.tie(cell.projection.labels[1], units)
        out = cell.projection.labels[0]
    call.tie(cell.hidden.labels[1], out)
    for states, labels in ((hidden_states, out), (cell_states, units)):
        for state in states:
            call.tie(state.labels[-1], labels)
    _same_in_every_layer(call, "hidden_size", units)
    if cell.projection is not None:
        _same_in_every_layer(call, "proj_size", out)
    _note(call, x, cell, gates, units, out)
    return out


def _tie_gates(call: Call, rows: MaybeLabels, units: MaybeLabels, gates: int) -> None:
    if rows is not None and units is not None:
        for gate in rows.reshape(gates, -1):
            call.tie(gate, units)
    elif rows is not None:  # one hidden unit: its gates cannot go
        call.freeze_silently(rows)


def _same_in_every_layer(call: Call, attribute: str, labels: MaybeLabels) -> None:
    """A module has one such number for all its layers and directions, so these lose the same units."""
    if labels is None:
        return
    known: list[Array] = call.trace.sizes.get((call.module, attribute), [])
    for other in known[:1]:
        if len(other) == len(labels):
            call.tie(other, labels)
    call.size_of(attribute, labels)


def _note(call: Call, x: Info, cell: _Cell, gates: int, units: MaybeLabels, out: MaybeLabels) -> None:
    """Note the products: of the input, of what the layer gave the step before, and of the projection."""

    def inside(width: int, labels: MaybeLabels) -> Info:
        return Info((*x.shape[:-1], width), [*[None] * (len(x.shape) - 1), labels], dynamic=True, zero=True)

    biases = (*cell.biases, None, None)
    products = [
        (x, cell.inputs, biases[0], gates),
        (inside(cell.hidden.shape[1], out), cell.hidden, biases[1], gates),
    ]
    if cell.projection is not None:
        products.append((inside(cell.projection.shape[1], units), cell.projection, None, 1))
    for left, weight, bias, count in products:
        last = len(left.shape) - 1
        call.tie(left.labels[last], weight.labels[1])
        call.trace.consumed.append(weight.labels[1])
        call.contractions.append(Contraction(left, last, weight, 1, weight=True, bias=bias, gates=count))
        call.costs(math.prod(x.shape[:-1]) * math.prod(weight.shape), *weight.labels)


@rule("aten._thnn_fused_lstm_cell", "aten._thnn_fused_gru_cell")
def fused_cell(call: Call) -> list[MaybeLabels]:
    """Gates that are made already, and the state, to the next state."""
    gates = 4 if "lstm" in call.cause.operator else 3
    state = call.inputs[2]
    units = state.labels[-1]
    if units is None and state.shape[-1] > 1:
        units = call.fresh(state.shape[-1])
        call.freeze(units, "the state is of fixed size")
    for info in (*call.inputs[:2], *call.inputs[3:]):
        _tie_gates(call, info.labels[-1], units, gates)
    call.zero = [False, all(info.zeros[-1] for info in call.inputs)]
    for index in range(1, len(call.outputs)):
        width = call.shape(index)[-1]
        if units is not None and width == len(units):
            call.give(index, [state.labels[0], units])
    return [state.labels[0], units]

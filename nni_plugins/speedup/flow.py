"""What masks do to what flows through a model: where tensors no longer depend on the input, and where they are zero.

This is read from the watched run and the masks alone, operator by operator, for each labelled dimension of each tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from nni_plugins.channels.call import Contraction, Info, Operator, Written
from nni_plugins.channels.graph import ChannelGraph
from nni_plugins.channels.labels import Array
from nni_plugins.speedup.masks import unmasked

Masks = Mapping[str, torch.Tensor]

#: Operators that put tensors next to each other: what one of them carries, the others need not carry.
JOINS = frozenset("aten.cat aten.concat aten.concatenate".split())
NORMS = frozenset(
    (
        "aten.native_batch_norm aten._native_batch_norm_legit aten._native_batch_norm_legit_no_training "
        "aten._batch_norm_no_update aten._batch_norm_with_update aten.cudnn_batch_norm aten.miopen_batch_norm "
        "aten.batch_norm aten.native_layer_norm aten.native_group_norm aten._fused_rms_norm aten.rms_norm"
    ).split()
)
_OVER_LAST = frozenset(["aten.native_layer_norm", "aten._fused_rms_norm", "aten.rms_norm"])
#: Operators whose result is zero wherever one of these inputs is (by position).
_FACTORS: dict[str, tuple[int, ...]] = {
    "aten.mul": (0, 1),
    "aten.div": (0,),
    "aten._trilinear": (0, 1, 2),
    "aten._weight_norm_interface": (0, 1),
    "aten._weight_norm": (0, 1),
}
#: Operators that only put elements elsewhere: what is zero stays so, whatever else is known.
_MOVES = frozenset(
    f"aten.{name}"
    for name in (
        "view _unsafe_view reshape _reshape_alias transpose permute t expand repeat unsqueeze squeeze clone detach "
        "alias _to_copy contiguous split split_with_sizes unsafe_split chunk unbind select slice flip roll "
        "index index_select gather unfold im2col pixel_shuffle pixel_unshuffle channel_shuffle"
    ).split()
)
#: Operators of several tensors whose result is zero where the first of them is.
_BY_FIRST = frozenset(
    f"aten.{name}"
    for name in "prelu _prelu_kernel grid_sampler_2d grid_sampler_3d cudnn_grid_sampler fmod remainder".split()
) | {"torchvision.roi_align", "torchvision.roi_pool"}
_ZEROS = frozenset(["aten.zeros_like", "aten.zero", "aten.new_zeros", "aten.zeros"])
_TURNS = frozenset(["aten.t", "aten.transpose", "aten.permute", "aten.detach"])


@dataclass
class _State:
    """Per labelled dimension of one tensor: where it does not depend on the input, and where it is exactly zero."""

    dead: list[Array | None]
    zero: list[Array | None]


class Flow:
    """Where, under masks, the tensors of a watched run are dead (they do not depend on the input) and where zero.

    Parameters
    ----------
    graph
        The channel graph of the unmasked model.
    masks
        ``{parameter name: mask}``; what is 0 in a mask is masked.
    """

    def __init__(self, graph: ChannelGraph, masks: Masks, alive: Mapping[str, Array] | None = None) -> None:
        self._graph = graph
        self._classes = graph.solution.classes
        self._masks = masks
        self._alive = {name: unmasked(mask) for name, mask in masks.items()} if alive is None else alive
        self._patterns: dict[int, Array | None] = {}
        self._sources: dict[int, str] = {}
        self._states: dict[int, _State] = {}
        self._blank: set[int] = set()
        self._rewritten = {id(written.info): written for written in graph.trace.written}
        count = len(graph.solution)
        self._seen = np.zeros(count, dtype=bool)
        self._live = np.zeros(count, dtype=bool)
        self._nonzero = np.zeros(count, dtype=bool)

    def run(self) -> None:
        """Follow the run from its inputs to its outputs."""
        for operator in self._graph.trace.operators:
            self._propagate(operator)

    # -- what is known -----------------------------------------------------------------------------------------------

    def zero(self, info: Info, dim: int) -> Array:
        """Where ``info`` is zero along a labelled dimension."""
        value = self._state(info).zero[dim]
        assert value is not None
        return value

    def dead(self, info: Info, dim: int) -> Array:
        """Where ``info`` does not depend on the input along a labelled dimension."""
        value = self._state(info).dead[dim]
        assert value is not None
        return value

    def all_zero(self, info: Info) -> bool:
        """Whether ``info`` is zero everywhere, by its masks: what was made as zeros may be there to be written into."""
        known = [zero for zero in self._state(info).zero if zero is not None and len(zero)]
        return id(info) not in self._blank and any(bool(zero.all()) for zero in known)

    def masked_whole(self) -> set[str]:
        """The parameters of which nothing is left."""
        return {name for name, alive in self._alive.items() if not alive.any()}

    def source(self, info: Info) -> str | None:
        """The parameter that ``info`` is, seen from another side."""
        return self._sources.get(id(info))

    def alive_along(self, parameter: str, dim: int) -> Array | None:
        """Which indices of a parameter's dimension are not masked whole; None where no mask is known."""
        alive = self._alive.get(parameter)
        if alive is None:
            return None
        if dim < alive.ndim:
            return np.atleast_1d(alive.any(axis=tuple(d for d in range(alive.ndim) if d != dim)))
        return np.asarray((self._masks[parameter] != 0).movedim(dim, 0).flatten(1).any(1).cpu())

    def oriented(self, c: Contraction) -> Array | None:
        """The unmasked entries of a weight as ``[out, in]``; for a grouped contraction ``in`` counts within the group.

        None where no mask is known, or it is not known entry by entry.
        """
        assert c.right is not None
        pattern = self._pattern(c.right)
        if pattern is None or pattern.ndim != 2 or {c.right_dim, c.right_out} != {0, 1}:
            return None
        if c.right_out == 0:
            return pattern
        if c.groups == 1:
            return pattern.T
        inputs, per_group = pattern.shape[0] // c.groups, pattern.shape[1]
        table = pattern.reshape(c.groups, inputs, per_group).transpose(0, 2, 1)
        return table.reshape(c.groups * per_group, inputs)

    def _pattern(self, info: Info) -> Array | None:
        """Which entries of a weight are not masked, kernel positions taken together; None where no mask is known."""
        if id(info) in self._patterns:
            return self._patterns[id(info)]
        return self._alive.get(info.parameter)

    def _state(self, info: Info) -> _State:
        state = self._states.get(id(info))
        if state is None:
            written = self._rewritten.get(id(info))
            state = self._first_state(info) if written is None else self._rewritten_state(info, written)
            self._states[id(info)] = state
        return state

    def _rewritten_state(self, info: Info, written: Written) -> _State:
        """The state of a tensor that was written through other views: zero where it was and zeros were written."""
        zero = list(self._state(written.before).zero)
        for view in written.writes:
            for labels, given in zip(view.labels, self._state(view).zero, strict=True):
                if labels is None or given is None:
                    continue
                nonzero = self._classes[labels[~given]]
                for dim, (own, value) in enumerate(zip(info.labels, zero, strict=True)):
                    if own is not None and value is not None:
                        zero[dim] = np.asarray(value & ~np.isin(self._classes[own], nonzero))
        return _State([None if value is None else value.copy() for value in zero], zero)

    def _first_state(self, info: Info) -> _State:
        """The state of an input, a constant or a parameter: only a masked parameter is zero anywhere."""
        dead: list[Array | None] = []
        zero: list[Array | None] = []
        for dim, labels in enumerate(info.labels):
            if labels is None:
                dead.append(None)
                zero.append(None)
                continue
            dead.append(np.full(len(labels), not info.dynamic))
            unasked = dim > 1 and self._graph.solution.frozen[self._classes[labels]].all()  # kernel positions
            alive = None if unasked else self.alive_along(info.parameter, dim)
            zero.append(np.zeros(len(labels), dtype=bool) if alive is None else ~alive)
        return _State(dead, zero)

    # -- what flows ------------------------------------------------------------------------------------------------

    def _propagate(self, operator: Operator) -> None:
        """Work out the outputs' states: by default a unit is dead where every input that carries it is.

        Each input that depends on the model's input must carry it: a constant times a gate that is broadcast over the
        units is no constant, nor is what is picked from a table by an index.
        """
        touched = []
        for info in operator.inputs:
            state = self._state(info)
            for labels, dead, zero in zip(info.labels, state.dead, state.zero, strict=True):
                if labels is None or dead is None or zero is None:
                    continue
                classes = self._classes[labels]
                touched.append(classes)
                self._seen[classes] = True
                self._live[classes[~dead]] = True
                self._nonzero[classes[~zero]] = True
        partners = [info for info in operator.inputs if info.dynamic] if operator.name not in JOINS else []
        zeros, moves = operator.name.rstrip("_") in _ZEROS, operator.name in _MOVES
        if zeros or (moves and operator.inputs and all(id(info) in self._blank for info in operator.inputs)):
            self._blank.update(id(info) for info in operator.outputs)
        added = [] if moves or operator.name in _BY_FIRST else [info for info in operator.inputs if _adds(info)]
        for info in operator.outputs:
            state = _State([None] * len(info.labels), [None] * len(info.labels))
            for dim, labels in enumerate(info.labels):
                if labels is None:
                    continue
                classes = self._classes[labels]
                known = self._seen[classes]
                zero = known & ~self._nonzero[classes] & (moves or info.zeros[dim])
                for other in added:
                    if zero.any() and not any(labels is own for own in other.labels):
                        zero = zero & self._carried(other, classes)
                zero = zero | zeros
                dead = known & ~self._live[classes]
                for partner in partners:
                    if dead.any() and not any(labels is own for own in partner.labels):
                        dead &= self._carried(partner, classes)
                state.zero[dim] = zero
                state.dead[dim] = dead | zero | np.full(len(labels), not info.dynamic)
            self._states[id(info)] = state
        for classes in touched:
            self._seen[classes] = self._live[classes] = self._nonzero[classes] = False
        self._special(operator)

    def _carried(self, info: Info, classes: Array) -> Array:
        own = [self._classes[labels] for labels in info.labels if labels is not None]
        return np.isin(classes, np.concatenate(own)) if own else np.zeros(len(classes), dtype=bool)

    def _special(self, operator: Operator) -> None:
        name = operator.name.rstrip("_")
        before = self._whole_groups(operator) if name == "aten.native_group_norm" else None
        for dim in operator.mixed:
            for out in operator.outputs:
                self._clear(out, dim)
        if before is not None:
            self._state(operator.outputs[0]).dead[1] = before
        if name in _FACTORS:
            for position in _FACTORS[name]:
                self._multiply(operator, position)
        elif name in NORMS:
            self._norm(operator)
        elif name in _TURNS and not operator.outputs[0].dynamic:
            self._transpose(operator)
        elif "attention" in name:
            self._multiply(operator, 2)
        if any(contraction.gates for contraction in operator.contractions):
            self._recur(operator)
            return
        for contraction in operator.contractions:
            if contraction.weight:
                self._contract(operator, contraction)
            if contraction.right is not None and name == "aten.bmm":
                self._product(operator, contraction)

    def _multiply(self, operator: Operator, position: int) -> None:
        """What one factor has as zero is zero in a product."""
        if position >= len(operator.inputs):
            return
        info = operator.inputs[position]
        for labels, zero in zip(info.labels, self._state(info).zero, strict=True):
            if labels is not None and zero is not None and zero.any():
                self._kill(operator.outputs[0], self._whole(labels, zero))

    def _product(self, operator: Operator, c: Contraction) -> None:
        """A product of activations is zero where a row of the one, a column of the other, or a batch of either is."""
        for info, contracted in ((c.left, c.left_dim), (c.right, c.right_dim)):
            assert info is not None
            for dim, labels in enumerate(info.labels):
                if labels is not None and dim != contracted and self.zero(info, dim).any():
                    self._kill(operator.outputs[0], self._whole(labels, self.zero(info, dim)))

    def _whole(self, labels: Array, zero: Array) -> Array:
        """The units of which every index is zero: where a unit has several, one of them says nothing of the others."""
        return np.setdiff1d(self._classes[labels[zero]], self._classes[labels[~zero]])

    def _kill(self, out: Info, classes: Array) -> None:
        self._live[classes] = True
        state = self._state(out)
        for dim, labels in enumerate(out.labels):
            if labels is not None:
                hit = self._live[self._classes[labels]]
                state.dead[dim] = self.dead(out, dim) | hit
                state.zero[dim] = self.zero(out, dim) | hit
        self._live[classes] = False

    def _clear(self, out: Info, dim: int) -> None:
        """Along ``dim``, each index depends on the others: one that was constant is not so any more."""
        labels = out.labels[dim] if dim < len(out.labels) else None
        if labels is not None and out.dynamic:
            self._state(out).dead[dim] = np.zeros(len(labels), dtype=bool)
            self._state(out).zero[dim] = np.zeros(len(labels), dtype=bool)

    def _whole_groups(self, operator: Operator) -> Array | None:
        """Where all channels of a group of a group norm are dead: what the norm makes of them is constant."""
        x = operator.inputs[0]
        if x.labels[1] is None:
            return None
        groups = operator.outputs[1].shape[-1]
        dead = self.dead(x, 1).reshape(groups, -1).all(axis=1)
        return np.repeat(dead, len(x.labels[1]) // groups)

    def _norm(self, operator: Operator) -> None:
        """A norm's masked weight makes its output constant, and zero if the bias is masked too."""
        out, first = operator.outputs[0], 2 if operator.name in _OVER_LAST else 1
        given = operator.args[first : first + 2]
        weight, bias = (value if isinstance(value, Info) else None for value in (*given, None, None)[:2])
        if weight is None and bias is None:
            return
        dim = len(out.shape) - 1 if first == 2 else 1
        labels = out.labels[dim]
        if labels is None:
            return
        state, none = self._state(out), np.zeros(len(labels), dtype=bool)
        masked = self._zero_at_the_end(weight, len(labels)) if weight is not None else none
        state.dead[dim] = self.dead(out, dim) | masked
        state.zero[dim] = masked if bias is None else masked & self._zero_at_the_end(bias, len(labels))

    def _zero_at_the_end(self, info: Info, size: int) -> Array:
        labels = info.labels[-1]
        if labels is None or len(labels) != size:
            return np.zeros(size, dtype=bool)
        return self.zero(info, len(info.shape) - 1)

    def _transpose(self, operator: Operator) -> None:
        source, out = operator.inputs[0], operator.outputs[0]
        name = source.parameter or self._sources.get(id(source), "")
        if name and len(out.shape) == 2:
            pattern = self._pattern(source)
            self._patterns[id(out)] = pattern.T if pattern is not None and out.shape != source.shape else pattern
            if out.shape == source.shape and operator.name != "aten.detach" and pattern is not None:
                self._patterns[id(out)] = pattern.T
            self._sources[id(out)] = name

    def _contract(self, operator: Operator, c: Contraction) -> None:
        """Output ``o`` depends on the input only through unmasked entries whose input unit is not dead."""
        out = operator.outputs[0]
        if out.labels[c.out_dim] is None or c.right is None:
            return
        pattern = self.oriented(c)
        dead = self.dead(c.left, c.left_dim) if c.left.labels[c.left_dim] is not None else None
        zero = self.zero(c.left, c.left_dim) if c.left.labels[c.left_dim] is not None else None
        size, state = out.shape[c.out_dim], self._state(out)
        inputs = c.left.shape[c.left_dim]
        live = _reaches(pattern, dead, size, inputs, c.groups)
        nonzero = _reaches(pattern, zero, size, inputs, c.groups)
        if c.right.labels[c.right_out] is not None and c.right.shape[c.right_out] == size:
            masked = self.zero(
                c.right, c.right_out
            )  # of a weight that is cast or reshaped on the way, all that is known
            live, nonzero = live & ~masked, nonzero & ~masked
        state.dead[c.out_dim] = ~live
        state.zero[c.out_dim] = ~nonzero & self._without_bias(c, size)

    def _without_bias(self, c: Contraction, size: int) -> Array:
        """Where no bias is added, or a masked one."""
        if c.bias is None:
            return np.ones(size, dtype=bool)
        if len(c.bias.shape) and c.bias.labels[-1] is not None:
            return self.zero(c.bias, len(c.bias.shape) - 1)
        return np.zeros(size, dtype=bool)

    def _recur(self, operator: Operator) -> None:
        """A hidden unit is zero where all that makes its gates is masked, in every layer, and it starts as zero."""
        nonzero: list[Array] = []
        made: list[Array] = []
        for c in operator.contractions:
            assert c.right is not None
            rows = c.right.labels[c.right_out]
            if rows is None:
                continue
            zero = self.zero(c.right, c.right_out) & self._without_bias(c, len(rows))
            zero = zero.reshape(c.gates, -1).all(axis=0)
            classes = self._classes[rows[: len(zero)]]
            made.append(classes)
            nonzero.append(classes[~zero])
        states = [info for info in operator.inputs[1:] if not info.parameter and len(info.shape) in (2, 3)]
        for info in states:
            labels = info.labels[-1]
            if labels is not None:
                nonzero.append(self._classes[labels[~self.zero(info, len(info.labels) - 1)]])
        if not made:
            return
        gone = np.setdiff1d(np.concatenate(made), np.concatenate(nonzero))
        inside = [c.left for c in operator.contractions if c.left not in operator.inputs]
        for info in (*operator.outputs, *inside):
            self._state(info)
            self._kill(info, gone)


def _reaches(pattern: Array | None, blocked: Array | None, outputs: int, inputs: int, groups: int) -> Array:
    """Return, per output, whether an unmasked entry connects it to an input that is not blocked."""
    per_group = inputs // groups
    free = np.ones(inputs, dtype=bool) if blocked is None else ~blocked
    table = np.repeat(free.reshape(groups, per_group), outputs // groups, axis=0)
    if pattern is None:
        return np.asarray(table.any(axis=1))
    return np.asarray((pattern & table).any(axis=1))


def _adds(info: Info) -> bool:
    """Whether numbers of a tensor may show in a result where another is zero: those of an index or a mask do not."""
    return bool(info.shape) and (info.dtype is None or info.dtype.is_floating_point or info.dtype.is_complex)

"""From masks to a plan: which units carry nothing, read from the channel graph and the masks alone.

A unit can go when, wherever it is summed over, its activation does not depend on the input (all that produces it is
masked), or nobody reads it (the consumer's column is masked). What it leaves behind, if it is a constant other than
zero, is folded into the consumer's bias; :class:`Fold` says where.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from nni_plugins.channels.call import Contraction, Info, Operator
from nni_plugins.channels.graph import ChannelGraph, ChannelGroup, Member
from nni_plugins.channels.labels import Array
from nni_plugins.channels.plan import Plan

Masks = Mapping[str, torch.Tensor]

#: Operators whose result at one channel depends on the others: a constant channel does not stay constant.
MIXING = frozenset(
    (
        "aten.native_layer_norm aten.native_group_norm aten._fused_rms_norm aten.rms_norm aten._softmax "
        "aten._log_softmax aten._safe_softmax aten.softmax aten.log_softmax"
    ).split()
)
#: Operators that put tensors next to each other: what one of them carries, the others need not carry.
_JOINS = frozenset("aten.cat aten.concat aten.concatenate".split())
_NORMS = frozenset(
    (
        "aten.native_batch_norm aten._native_batch_norm_legit aten._native_batch_norm_legit_no_training "
        "aten._batch_norm_no_update aten._batch_norm_with_update aten.cudnn_batch_norm aten.miopen_batch_norm "
        "aten.batch_norm aten.native_layer_norm aten.native_group_norm aten._fused_rms_norm"
    ).split()
)


@dataclass(frozen=True)
class Fold:
    """A constant to be folded: ``operator`` contracts an input with its module's weight, and ``units`` of it go.

    The module has no other contraction, so that its name and the operator's find the place in another run.
    """

    operator: Operator
    contraction: Contraction
    units: Array


@dataclass
class _State:
    """Per labelled dimension of one tensor: where it does not depend on the input, and where it is exactly zero."""

    dead: list[Array | None]
    zero: list[Array | None]


class MaskInference:
    """Which units the masks of parameters leave without effect.

    Parameters
    ----------
    graph
        The channel graph of the unmasked model.
    model
        The model that the graph was watched on.
    masks
        ``{parameter name: mask}``; what is 0 in a mask is masked.
    exact_only
        Leave out groups whose removal is not the same as masking.
    stay
        Labels of units that stay whatever the masks say.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        model: nn.Module,
        masks: Masks,
        *,
        exact_only: bool = True,
        stay: Sequence[Array] = (),
    ) -> None:
        self._graph = graph
        self._classes = graph.solution.classes
        self._modules = dict(model.named_modules())
        self._exact_only = exact_only
        self._masks = masks
        self._alive = {name: _unmasked(mask) for name, mask in masks.items()}
        self._patterns: dict[int, Array | None] = {}
        self._sources: dict[int, str] = {}
        self._states: dict[int, _State] = {}
        count = len(graph.solution)
        self._seen = np.zeros(count, dtype=bool)
        self._live = np.zeros(count, dtype=bool)
        self._nonzero = np.zeros(count, dtype=bool)
        self._needed = np.zeros(count, dtype=bool)
        for labels in stay:
            self._needed[self._classes[labels]] = True
        self._uses = Counter(op.module for op in graph.trace.operators for c in op.contractions if c.weight)
        self.folds: list[Fold] = []

    def plan(self) -> Plan:
        """Return the plan, and set :attr:`folds`."""
        operators = self._graph.trace.operators
        for operator in operators:
            self._propagate(operator)
        removable = [g for g in self._graph.groups if g.prunable and (g.exact or not self._exact_only)]
        constants = self._find_needed(removable)
        kept = {group.name: self._needed[group.classes] for group in removable}
        plan = Plan(self._graph, kept)
        for operator, contraction, left_behind in constants:
            labels = contraction.left.labels[contraction.left_dim]
            assert labels is not None
            gone = np.flatnonzero(~plan.keeps(labels) & left_behind)
            if len(gone):
                self.folds.append(Fold(operator, contraction, gone))
        return plan

    def stayed(self, plan: Plan) -> dict[str, str]:
        """Return ``{group: a line}`` where units of ``plan`` stay although all that produces them is masked."""
        lines = {}
        for group in self._graph.groups:
            weights_of = [m for m in group.producers if len(self._graph.shapes[m.name]) > 1]
            rows = [self._masked_units(member) for member in weights_of]
            weights = [row for row in rows if row is not None]
            if not weights or len(weights) != len(rows):
                continue
            masked = np.logical_and.reduce(weights)
            kept = np.zeros(group.size, dtype=bool)
            kept[plan.kept.get(group.name, np.arange(group.size))] = True
            count = int((masked & kept).sum())
            if count == 0 or (count == kept.sum() == 1):  # nothing stays, or the one unit that a layer must have
                continue
            why = group.reason or "what they leave behind is no constant that a bias could take"
            lines[group.name] = f"{group.name}: {count} of {group.size} units: {why}"
        return lines

    def masks_parts_of_heads(self) -> bool:
        """Whether some rows that make an attention head are masked, but not all of that head."""
        for group in self._graph.groups:
            for member in group.producers if group.kind == "heads" else []:
                alive = self._alive_along(member.name, member.dim)
                if alive is not None:
                    rows = alive[member.indices]
                    if (rows.any(axis=1) & ~rows.all(axis=1)).any():
                        return True
        return False

    def _masked_units(self, member: Member) -> Array | None:
        """Which units of a group one producer's mask takes away; None where it has no mask."""
        alive = self._alive_along(member.name, member.dim)
        return None if alive is None else np.asarray(~alive[member.indices].any(axis=1))

    # -- what flows ------------------------------------------------------------------------------------------------

    def _state(self, info: Info) -> _State:
        state = self._states.get(id(info))
        if state is None:
            state = self._states[id(info)] = self._first_state(info)
        return state

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
            alive = None if unasked else self._alive_along(info.parameter, dim)
            zero.append(np.zeros(len(labels), dtype=bool) if alive is None else ~alive)
        return _State(dead, zero)

    def _alive_along(self, parameter: str, dim: int) -> Array | None:
        """Which indices of a parameter's dimension are not masked whole; None where no mask is known."""
        alive = self._alive.get(parameter)
        if alive is None:
            return None
        if dim < alive.ndim:
            return np.atleast_1d(alive.any(axis=tuple(d for d in range(alive.ndim) if d != dim)))
        return np.asarray((self._masks[parameter] != 0).movedim(dim, 0).flatten(1).any(1).cpu())

    def _zero(self, info: Info, dim: int) -> Array:
        value = self._state(info).zero[dim]
        assert value is not None
        return value

    def _dead(self, info: Info, dim: int) -> Array:
        value = self._state(info).dead[dim]
        assert value is not None
        return value

    def _propagate(self, operator: Operator) -> None:
        """Work out the outputs' states: by default a unit is dead where every input that carries it is.

        Where several inputs depend on the model's input, each must carry it: a constant times a gate that is broadcast
        over the units is no constant.
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
        dynamic = [info for info in operator.inputs if info.dynamic]
        partners = dynamic if len(dynamic) > 1 and operator.name not in _JOINS else []
        for info in operator.outputs:
            preserves = info.zero and operator.name not in _NORMS and not operator.contractions
            state = _State([None] * len(info.labels), [None] * len(info.labels))
            for dim, labels in enumerate(info.labels):
                if labels is None:
                    continue
                classes = self._classes[labels]
                known = self._seen[classes]
                zero = known & ~self._nonzero[classes] & preserves
                dead = known & ~self._live[classes]
                for partner in partners:
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
        if name == "aten.mul":
            self._multiply(operator)
        elif name in _NORMS:
            self._norm(operator)
        elif name in MIXING:
            self._clear(operator.outputs[0])
        elif name in ("aten.t", "aten.transpose", "aten.permute", "aten.detach") and not operator.outputs[0].dynamic:
            self._transpose(operator)
        for contraction in operator.contractions:
            if contraction.weight:
                self._contract(operator, contraction)
            elif contraction.right is not None and name == "aten.bmm":
                self._product(operator, contraction)

    def _multiply(self, operator: Operator) -> None:
        out = operator.outputs[0]
        for info in operator.inputs:
            state = self._state(info)
            for labels, zero in zip(info.labels, state.zero, strict=True):
                if labels is not None and zero is not None and zero.any():
                    self._kill(out, self._classes[labels[zero]])

    def _product(self, operator: Operator, c: Contraction) -> None:
        """A product of activations is zero where a row of the one, a column of the other, or a batch of either is."""
        for info, contracted in ((c.left, c.left_dim), (c.right, c.right_dim)):
            assert info is not None
            for dim, labels in enumerate(info.labels):
                if labels is not None and dim != contracted and self._zero(info, dim).any():
                    self._kill(operator.outputs[0], self._classes[labels[self._zero(info, dim)]])

    def _kill(self, out: Info, classes: Array) -> None:
        self._live[classes] = True
        state = self._state(out)
        for dim, labels in enumerate(out.labels):
            if labels is not None:
                hit = self._live[self._classes[labels]]
                state.dead[dim] = self._dead(out, dim) | hit
                state.zero[dim] = self._zero(out, dim) | hit
        self._live[classes] = False

    def _clear(self, out: Info) -> None:
        state = self._state(out)
        for dim, labels in enumerate(out.labels):
            if labels is not None:
                state.dead[dim] = np.zeros(len(labels), dtype=bool)
                state.zero[dim] = np.zeros(len(labels), dtype=bool)

    def _norm(self, operator: Operator) -> None:
        """A norm's masked weight makes its output constant, and zero if the bias is masked too."""
        out, affine = operator.outputs[0], [i for i in operator.inputs[1:3] if i.parameter and not i.dynamic]
        if operator.name in MIXING:
            self._clear(out)
        if not affine or affine[0].parameter.rpartition(".")[2] in ("running_mean", "running_var"):
            return
        weight = affine[0]
        if not weight.labels or weight.labels[-1] is None:
            return
        dim = 1 if operator.name not in ("aten.native_layer_norm", "aten._fused_rms_norm") else len(out.shape) - 1
        if out.labels[dim] is None or len(out.labels[dim]) != len(weight.labels[-1]):  # type: ignore[arg-type]
            return
        masked = self._zero(weight, len(weight.shape) - 1)
        state = self._state(out)
        state.dead[dim] = self._dead(out, dim) | masked
        shift = (
            affine[1] if len(affine) > 1 and not affine[1].parameter.endswith(("running_mean", "running_var")) else None
        )
        state.zero[dim] = masked & self._zero(shift, len(shift.shape) - 1) if shift is not None else masked

    def _transpose(self, operator: Operator) -> None:
        source, out = operator.inputs[0], operator.outputs[0]
        name = source.parameter or self._sources.get(id(source), "")
        if name and len(out.shape) == 2:
            pattern = self._pattern(source)
            self._patterns[id(out)] = pattern.T if pattern is not None and out.shape != source.shape else pattern
            if out.shape == source.shape and operator.name != "aten.detach" and pattern is not None:
                self._patterns[id(out)] = pattern.T
            self._sources[id(out)] = name

    def _pattern(self, info: Info) -> Array | None:
        """Which entries of a weight are not masked, kernel positions taken together; None where no mask is known."""
        if id(info) in self._patterns:
            return self._patterns[id(info)]
        return self._alive.get(info.parameter)

    def _contract(self, operator: Operator, c: Contraction) -> None:
        """Output ``o`` depends on the input only through unmasked entries whose input unit is not dead."""
        out = operator.outputs[0]
        if out.labels[c.out_dim] is None or c.right is None:
            return
        pattern = self._oriented(c)
        dead = self._dead(c.left, c.left_dim) if c.left.labels[c.left_dim] is not None else None
        zero = self._zero(c.left, c.left_dim) if c.left.labels[c.left_dim] is not None else None
        size, state = out.shape[c.out_dim], self._state(out)
        inputs = c.left.shape[c.left_dim]
        live = _reaches(pattern, dead, size, inputs, c.groups)
        nonzero = _reaches(pattern, zero, size, inputs, c.groups)
        if c.right.labels[c.right_out] is not None and c.right.shape[c.right_out] == size:
            masked = self._zero(
                c.right, c.right_out
            )  # of a weight that is cast or reshaped on the way, all that is known
            live, nonzero = live & ~masked, nonzero & ~masked
        state.dead[c.out_dim] = ~live
        bias = np.zeros(size, dtype=bool)
        if c.bias is not None and len(c.bias.shape) and c.bias.labels[-1] is not None:
            bias = ~self._zero(c.bias, len(c.bias.shape) - 1)
        elif c.bias is not None:
            bias = np.ones(size, dtype=bool)
        state.zero[c.out_dim] = ~nonzero & ~bias

    def _oriented(self, c: Contraction) -> Array | None:
        """The unmasked entries as ``[out, in]``; for a grouped contraction ``in`` counts within the group."""
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

    # -- what is needed --------------------------------------------------------------------------------------------

    def _find_needed(self, removable: Sequence[ChannelGroup]) -> list[tuple[Operator, Contraction, Array]]:
        """Mark what is needed, from the outputs backwards: a row that nobody needs reads nothing.

        Returned are the contractions that read units which do not depend on the input, and which of them: where these
        go, they leave a constant behind.
        """
        stays = np.ones(len(self._needed), dtype=bool)
        for group in removable:
            stays[group.classes] = False
        self._needed |= stays
        contractions = [(op, c) for op in self._useful() for c in op.contractions]
        rows: dict[int, Array] = {}
        constants: dict[int, Array] = {}
        while True:
            before = int(self._needed.sum())
            for operator, c in contractions:
                needed = self._needed_rows(operator, c)
                if id(c) not in rows or not np.array_equal(rows[id(c)], needed):
                    rows[id(c)] = needed
                    constants[id(c)] = self._judge(operator, c, needed)
            if int(self._needed.sum()) > before:
                continue
            emptied = [group for group in removable if not self._needed[group.classes].any()]
            if not emptied:
                return [(op, c, constants[id(c)]) for op, c in reversed(contractions) if constants[id(c)].any()]
            for group in emptied:
                self._needed[group.classes[0]] = True  # a layer is never emptied

    def _useful(self) -> list[Operator]:
        """The operators whose results reach an output, from the outputs backwards."""
        wanted = {id(info) for info in self._graph.trace.outputs}
        found = []
        for operator in reversed(self._graph.trace.operators):
            writes = operator.name.endswith("_") or not operator.outputs  # who reads that is not known
            if writes or any(id(info) in wanted for info in operator.outputs):
                wanted.update(id(info) for info in operator.inputs)
                found.append(operator)
        return found

    def _needed_rows(self, operator: Operator, c: Contraction) -> Array:
        """Which units of a contraction's result are needed."""
        out = operator.outputs[0]
        labels = out.labels[c.out_dim] if c.weight else None
        if labels is None:
            return np.ones(out.shape[c.out_dim] if c.weight else 1, dtype=bool)
        return self._needed[self._classes[labels]]

    def _judge(self, operator: Operator, c: Contraction, rows: Array) -> Array:
        """Mark the units that the needed rows of this contraction read; return which leave a constant behind."""
        labels = c.left.labels[c.left_dim]
        if labels is None:
            return np.zeros(0, dtype=bool)
        zero, classes = self._zero(c.left, c.left_dim), self._classes[labels]
        if c.right is None or not c.weight:
            other = zero
            if c.right is not None and c.groups == 1 and c.right.labels[c.right_dim] is not None:
                other = zero | self._zero(c.right, c.right_dim)
            self._needed[classes[~other]] = True
            return np.zeros(0, dtype=bool)
        unread = _unread(self._oriented(c), rows, len(labels), c.groups)
        if c.groups == 1 and c.right.labels[c.right_dim] is not None:
            unread = unread | self._zero(c.right, c.right_dim)
        dead = self._dead(c.left, c.left_dim)
        foldable = self._foldable(operator, c)
        self._needed[classes[~(unread | (dead if foldable else zero))]] = True
        return dead & ~zero & ~unread if foldable else np.zeros(0, dtype=bool)

    def _foldable(self, operator: Operator, c: Contraction) -> bool:
        """Whether what the removed units leave behind can go into the bias of the module that contracts them."""
        module: Any = self._modules.get(operator.module)
        weight = getattr(module, "weight", None)
        if c.right is None or not isinstance(weight, nn.Parameter) or not hasattr(module, "bias"):
            return False
        if not c.left.dynamic:
            return False  # a learned constant: nothing of it is masked only because it does not change
        prefix = f"{operator.module}." if operator.module else ""
        if (c.right.parameter or self._sources.get(id(c.right))) != f"{prefix}weight":
            return False  # the weight is changed on the way
        if module.bias is not None and (c.bias is None or c.bias.parameter != f"{prefix}bias"):
            return False  # the bias is not added here, or is another module's
        if f"{prefix}bias" in self._graph.aliases:
            return False
        if self._uses[operator.module] != 1:
            return False  # called several times: what one call leaves behind is not what another does
        plain = operator.name in ("aten.mm", "aten.addmm", "aten.linear") or (
            operator.name == "aten.convolution" and c.right_out == 0
        )
        return plain and tuple(weight.shape) in (c.right.shape, c.right.shape[::-1])


def _unmasked(mask: torch.Tensor) -> Array:
    """Return which entries a mask keeps, over the first two dimensions: a kernel is alive if any of it is."""
    alive = mask.detach() != 0
    return np.asarray((alive.flatten(2).any(2) if alive.dim() > 2 else alive).cpu())


def _reaches(pattern: Array | None, blocked: Array | None, outputs: int, inputs: int, groups: int) -> Array:
    """Return, per output, whether an unmasked entry connects it to an input that is not blocked."""
    per_group = inputs // groups
    free = np.ones(inputs, dtype=bool) if blocked is None else ~blocked
    table = np.repeat(free.reshape(groups, per_group), outputs // groups, axis=0)
    if pattern is None:
        return np.asarray(table.any(axis=1))
    return np.asarray((pattern & table).any(axis=1))


def _unread(pattern: Array | None, rows: Array, inputs: int, groups: int) -> Array:
    """Return, per input, whether all entries that read it are masked, or in rows that nobody needs."""
    per_group = inputs // groups
    if len(rows) % groups or (pattern is not None and len(pattern) != len(rows)):
        rows = np.ones(groups if pattern is None else len(pattern), dtype=bool)
    if pattern is None:
        return np.repeat(~rows.reshape(groups, -1).any(axis=1), per_group)
    read = pattern if rows.all() else pattern & rows[:, None]
    return np.asarray(~read.reshape(groups, -1, per_group).any(axis=1)).reshape(inputs)

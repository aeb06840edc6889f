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
from torch import nn

from nni_plugins.channels.blocks import removal_of
from nni_plugins.channels.call import Contraction, Operator
from nni_plugins.channels.graph import ChannelGraph, ChannelGroup, Member
from nni_plugins.channels.labels import Array
from nni_plugins.channels.plan import Plan
from nni_plugins.channels.removal import Removal
from nni_plugins.speedup.flow import Flow, Masks
from nni_plugins.speedup.masks import unmasked
from nni_plugins.speedup.whole import masked_blocks, passed_blocks


@dataclass(frozen=True)
class Fold:
    """A constant to be folded: ``operator`` contracts an input with its module's weight, and ``units`` of it go.

    The module has no other contraction, so that its name and the operator's find the place in another run.
    """

    operator: Operator
    contraction: Contraction
    units: Array


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
    alive
        What :func:`~nni_plugins.speedup.flow.unmasked` makes of each mask, where it is known already.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        model: nn.Module,
        masks: Masks,
        *,
        exact_only: bool = True,
        stay: Sequence[Array] = (),
        alive: Mapping[str, Array] | None = None,
    ) -> None:
        self._graph = graph
        self._classes = graph.solution.classes
        self._modules = dict(model.named_modules())
        self._exact_only = exact_only
        alive = {name: unmasked(mask) for name, mask in masks.items()} if alive is None else alive
        masked = {name for name, left in alive.items() if not left.any()}
        self._passed = [] if exact_only else passed_blocks(graph, masked)
        hidden = {name for block in self._passed for name in graph.block(block).parameters}
        self._flow = Flow(graph, masks, {name: left for name, left in alive.items() if name not in hidden})
        self._needed = np.zeros(len(graph.solution), dtype=bool)
        for labels in stay:
            self._needed[self._classes[labels]] = True
        self._uses = Counter(op.module for op in graph.trace.operators for c in op.contractions if c.weight)
        self._removal = Removal()
        self.folds: list[Fold] = []

    def plan(self) -> Plan:
        """Return the plan, and set :attr:`folds`."""
        self._flow.run()
        blocks = masked_blocks(self._graph, self._flow, self._passed)
        self._removal = removal_of(self._graph, blocks)
        removable = [g for g in self._graph.groups if g.prunable and (g.exact or not self._exact_only)]
        removable = [g for g in removable if not self._removal.takes(g)]
        constants = self._find_needed(removable)
        kept = {group.name: _in_multiples(self._needed[group.classes], group.multiple) for group in removable}
        plan = Plan(self._graph, kept, blocks)
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
            if plan.removal.takes(group):
                continue
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
            if count < group.multiple and not group.reason:
                why = f"how many stay must be a multiple of {group.multiple}, which their kernel takes"
            lines[group.name] = f"{group.name}: {count} of {group.size} units: {why}"
        return lines

    def partly_masked(self) -> list[ChannelGroup]:
        """Return the groups (of heads) of which some, but not all, rows or columns of one unit are masked."""
        return [group for group in self._graph.groups if group.prunable and self._masks_parts_of(group)]

    def _masks_parts_of(self, group: ChannelGroup) -> bool:
        for member in (*group.producers, *group.consumers):
            alive = self._flow.alive_along(member.name, member.dim)
            if alive is not None:
                rows = alive[member.indices]
                if (rows.any(axis=1) & ~rows.all(axis=1)).any():
                    return True
        return False

    def _masked_units(self, member: Member) -> Array | None:
        """Which units of a group one producer's mask takes away; None where it has no mask."""
        alive = self._flow.alive_along(member.name, member.dim)
        return None if alive is None else np.asarray(~alive[member.indices].any(axis=1))

    # -- what is needed --------------------------------------------------------------------------------------------

    def _find_needed(self, removable: Sequence[ChannelGroup]) -> list[tuple[Operator, Contraction, Array]]:
        """Mark what is needed, from the outputs backwards: a row that nobody needs reads nothing.

        Returned are the contractions that read units which do not depend on the input, and which of them: where these
        go, they leave a constant behind.
        """
        gone = {id(self._graph.trace.operators[place]) for place in np.flatnonzero(self._removal.operators).tolist()}
        stays = np.ones(len(self._needed), dtype=bool)
        for group in removable:
            stays[group.classes] = False
        self._needed |= stays
        contractions = [(op, c) for op in self._useful() for c in op.contractions if id(op) not in gone]
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
        zero, classes = self._flow.zero(c.left, c.left_dim), self._classes[labels]
        if c.right is None or not c.weight:
            other = zero
            if c.right is not None and c.groups == 1 and c.right.labels[c.right_dim] is not None:
                other = zero | self._flow.zero(c.right, c.right_dim)
            self._needed[classes[~other]] = True
            return np.zeros(0, dtype=bool)
        unread = _unread(self._flow.oriented(c), rows, len(labels), c.groups)
        if c.groups == 1 and c.right.labels[c.right_dim] is not None:
            unread = unread | self._flow.zero(c.right, c.right_dim)
        dead = self._flow.dead(c.left, c.left_dim)
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
        if (c.right.parameter or self._flow.source(c.right)) != f"{prefix}weight":
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


def _in_multiples(kept: Array, multiple: int) -> Array:
    """Keep some more, the first of those that could go, where how many stay must be a multiple of some number."""
    missing = -int(kept.sum()) % multiple
    if missing:
        kept = kept.copy()
        kept[np.flatnonzero(~kept)[:missing]] = True
    return kept


def _unread(pattern: Array | None, rows: Array, inputs: int, groups: int) -> Array:
    """Return, per input, whether all entries that read it are masked, or in rows that nobody needs."""
    per_group = inputs // groups
    if len(rows) % groups or (pattern is not None and len(pattern) != len(rows)):
        rows = np.ones(groups if pattern is None else len(pattern), dtype=bool)
    if pattern is None:
        return np.repeat(~rows.reshape(groups, -1).any(axis=1), per_group)
    read = pattern if rows.all() else pattern & rows[:, None]
    return np.asarray(~read.reshape(groups, -1, per_group).any(axis=1)).reshape(inputs)

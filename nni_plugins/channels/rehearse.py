"""Rehearsal: what a plan would do to the model is tried on a skeleton, before anything is removed.

A forward may hold sizes: in an attribute (``num_heads``), which then has to follow, or written into it
(``x.view(b, -1, 8)``), so that what would change the size must stay. Both come out where a replay first leaves the
prediction. What one module teaches is taken to hold for the others of its class at the same place of their forward, so
that a deep model takes as many replays as it has kinds of modules, not as many as it has modules.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
from torch import nn

from nni_plugins.channels.call import Info, Operator
from nni_plugins.channels.graph import ChannelGraph, ChannelGroup
from nni_plugins.channels.labels import Array, Cause
from nni_plugins.channels.plan import Plan
from nni_plugins.channels.replay import Mismatch, Replay, plain_name

_logger = logging.getLogger(__name__)

FIXED = "its forward holds a fixed size"
SCALED = "its forward computes with a number that follows the size"

PlanOf = Callable[[ChannelGraph], Plan]


def rehearsed(graph: ChannelGraph, model: nn.Module, dummy_input: Any, *, inexact: bool = True) -> ChannelGraph:
    """Return ``graph`` with every group frozen that ``model`` cannot lose units of, and with what attributes count.

    Some units of every prunable exact group are removed on a skeleton, and after that, with ``inexact``, of every
    prunable group.

    Parameters
    ----------
    graph
        What was watched.
    model
        The model that was watched; it is left as it is.
    dummy_input
        The input that it was watched with.
    inexact
        Whether to try the groups whose removal is not the same as masking.
    """
    graph, _ = settled(graph, model, dummy_input, lambda g: trial_plan(g, inexact=False))
    if inexact and any(group.prunable and not group.exact for group in graph.groups):
        exact = {group.name for group in graph.groups if group.prunable and group.exact}
        graph, _ = settled(graph, model, dummy_input, lambda g: trial_plan(g, inexact=True), innocent=exact)
    return graph


def blocks_rehearsed(graph: ChannelGraph, model: nn.Module, dummy_input: Any) -> ChannelGraph:
    """Return ``graph`` with those blocks known to stay that ``model`` does not run without.

    Blocks that are equally deep inside others are tried at once, the outermost first.
    """
    names = [block.name for block in graph.blocks if block.removable]
    depth = {name: sum(name.startswith(f"{other}.") for other in names) for name in names}
    for level in range(max(depth.values(), default=-1) + 1):
        waiting = [[name for name in names if depth[name] == level]]
        while waiting:
            tried = waiting.pop()
            try:
                Plan(graph, {}, tried)
            except ValueError:  # they cannot all go
                middle = len(tried) // 2
                waiting += [tried[:middle], tried[middle:]] if middle else []
                continue
            graph, _ = settled(graph, model, dummy_input, lambda g, tried=tried: _without_blocks(g, tried))  # type: ignore[misc]
    return graph


def _without_blocks(graph: ChannelGraph, names: Sequence[str]) -> Plan:
    return Plan(graph, {}, [name for name in names if name not in graph.staying])


def trial_plan(graph: ChannelGraph, *, inexact: bool) -> Plan:
    """Return a plan by which every group loses a few units, from both ends, and neighbours different numbers."""
    kept = {}
    for index, group in enumerate(graph.groups):
        if group.prunable and (group.exact or inexact):
            lost = min(2, group.size - 1) + index % max(1, min(5, group.size // 4))
            places = np.unique(np.linspace(0, group.size - 1, lost).round().astype(np.int64))
            kept[group.name] = np.delete(np.arange(group.size), places)
    return Plan(graph, kept)


def settled(
    graph: ChannelGraph,
    model: nn.Module,
    dummy_input: Any,
    plan_of: PlanOf,
    *,
    skip: Collection[str] = (),
    innocent: Collection[str] = (),
    on_freeze: Callable[[Mismatch], None] | None = None,
) -> tuple[ChannelGraph, Plan]:
    """Replay the plan of ``graph`` until it runs as predicted; return the graph and the plan by which it does.

    Parameters
    ----------
    graph, model, dummy_input
        As in :func:`rehearsed`.
    plan_of
        Makes the plan, again each time that something more has turned out to stay.
    skip
        Names of modules that are compact already.
    innocent
        Names of groups that are known to run without the others, and so are not to blame.
    on_freeze
        Called with each mismatch that makes something stay.

    Returns
    -------
    tuple
        The graph, with what must stay frozen, and its plan. A model that runs otherwise each time cannot be replayed:
        its graph and plan come back as they are.
    """
    modules = dict(model.named_modules())
    peers = _Peers(graph, modules)
    while True:
        plan = plan_of(graph)
        replay = Replay(plan, dummy_input, skip)
        mismatch = replay.run(model)
        while mismatch is not None and not mismatch.scaled:
            better = _learn(graph, replay, model, modules, mismatch, peers)
            if better is mismatch:
                break
            mismatch = better
        if mismatch is None:
            return graph, plan
        stay = _blocks_to_blame(plan, model, dummy_input, skip, mismatch)
        if stay:
            if on_freeze is not None:
                on_freeze(mismatch)
            graph = graph.without_blocks(dict.fromkeys(stay, f"the model does not run without it ({mismatch})"))
            continue
        culprits = [] if innocent or mismatch.scaled else _culprits(replay, mismatch, peers)
        if not culprits:
            culprits = _found_by_halving(graph, plan, model, dummy_input, skip, mismatch, innocent, peers)
        if not culprits:
            _logger.warning("the model does not run twice in the same way, so nothing can be rehearsed: %s", mismatch)
            return graph, plan
        if on_freeze is not None:
            on_freeze(mismatch)
        graph = graph.without(culprits)


# -- attributes that follow ----------------------------------------------------------------------------------------


def _learn(
    graph: ChannelGraph,
    replay: Replay,
    model: nn.Module,
    modules: dict[str, nn.Module],
    mismatch: Mismatch,
    peers: _Peers,
) -> Mismatch | None:
    """Let an integer attribute of the failing module or its parents follow the labels that change around a mismatch.

    Returns the next mismatch, None if there is none left, or the same one where no attribute helps.
    """
    if mismatch.operator is None:
        return mismatch
    places = list(_shrinking(replay, mismatch.operator))
    name = mismatch.module
    while True:
        owner = modules.get(name)
        for attribute, value in list(vars(owner).items()) if owner is not None else []:
            size = value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value  # normalized_shape
            if isinstance(size, bool) or not isinstance(size, int):
                continue
            for place, labels in places:
                if len(labels) != size or _follows(graph, (name, attribute), labels):
                    continue
                added = [((name, attribute), labels), *peers.same_attribute(mismatch.operator, name, attribute, place)]
                before = {key: list(graph.learnt.get(key, [])) for key, _ in added}
                for key, array in added:
                    graph.learnt[key] = [a for a in before[key] if len(a) != len(array)] + [array]
                after = replay.run(model)
                if after is None or after.index > mismatch.index:
                    return after
                for key, arrays in before.items():
                    graph.learnt[key] = arrays
        if not name:
            return mismatch
        name = name.rpartition(".")[0]


def _follows(graph: ChannelGraph, key: tuple[str, str], labels: Array) -> bool:
    return any(labels is known for known in graph.learnt.get(key, []))


Place = tuple[int, int]  # which of an operator's tensors, outputs first, and which dimension


def _tensors(operator: Operator) -> list[Info]:
    return [*operator.outputs, *operator.inputs]


def _shrinking(replay: Replay, operator: Operator) -> Iterator[tuple[Place, Array]]:
    """Yield the dimensions around an operator that shrink; of several that carry the same labels, the first."""
    seen: set[int] = set()
    for which, info in enumerate(_tensors(operator)):
        for dim, labels in enumerate(info.labels):
            if labels is not None and id(labels) not in seen and replay.kept(len(labels), labels) != len(labels):
                seen.add(id(labels))
                yield (which, dim), labels


# -- groups that must stay -----------------------------------------------------------------------------------------


def _culprits(replay: Replay, mismatch: Mismatch, peers: _Peers) -> list[tuple[Array, Cause]]:
    """Return the labels to freeze so that a mismatch cannot come back, there and at the same place of peers."""
    if mismatch.operator is None:
        return []
    outputs = len(mismatch.operator.outputs)
    wrong = {i for i, info in enumerate(mismatch.operator.outputs) if replay.predicted(info) != info.shape}
    found = []
    for place, _ in _shrinking(replay, mismatch.operator):
        if place[0] >= outputs or place[0] in wrong or not wrong:
            for operator in [mismatch.operator, *peers.of(mismatch.operator)]:
                labels = _at(operator, place)
                if labels is not None:
                    found.append((labels, Cause(operator.module, operator.name, FIXED)))
    return found


def _at(operator: Operator, place: Place) -> Array | None:
    tensors = _tensors(operator)
    which, dim = place
    return tensors[which].labels[dim] if which < len(tensors) and dim < len(tensors[which].labels) else None


def _found_by_halving(
    graph: ChannelGraph,
    plan: Plan,
    model: nn.Module,
    dummy_input: Any,
    skip: Collection[str],
    mismatch: Mismatch,
    innocent: Collection[str],
    peers: _Peers,
) -> list[tuple[Array, Cause]]:
    """Find groups without which the plan runs, where the operator that fails does not name them.

    Where a number follows their size, so it does at the same place of peers.
    """

    def fails(names: Sequence[str]) -> bool:
        wanted = {name: plan.kept[name] for name in plan.kept if name in names or name in innocent}
        return Replay(Plan(graph, wanted, plan.blocks), dummy_input, skip).run(model) is not None

    suspects = [name for name in plan.kept if name not in innocent]
    if not suspects or fails([]):
        return []
    suspects = _fewest(suspects, fails)
    operator = mismatch.operator
    if operator is None:
        return [(graph.labels_of(name), Cause("", "", FIXED)) for name in suspects]
    cause = Cause(operator.module, operator.name, SCALED if mismatch.scaled else FIXED)
    found = [(graph.labels_of(name), cause) for name in suspects]
    for name in suspects if mismatch.scaled else ():
        found += [(labels, cause) for labels in peers.same_group(operator, graph.group(name))]
    return found


def _blocks_to_blame(
    plan: Plan, model: nn.Module, dummy_input: Any, skip: Collection[str], mismatch: Mismatch
) -> list[str]:
    """Find blocks whose removal makes a plan fail at ``mismatch`` or before: without them, nothing fails so early."""
    operators = plan.graph.trace.operators

    def place(of: Mismatch) -> int:
        return next((i for i, operator in enumerate(operators) if operator is of.operator), len(operators))

    def fails(names: Sequence[str]) -> bool:
        again = Replay(Plan(plan.graph, plan.kept, names), dummy_input, skip).run(model)
        return again is not None and place(again) <= place(mismatch)

    return [] if not plan.blocks or fails([]) else _fewest(list(plan.blocks), fails)


def _fewest(suspects: list[str], fails: Callable[[Sequence[str]], bool]) -> list[str]:
    """Halve suspects for as long as one half fails by itself."""
    while len(suspects) > 1:
        middle = len(suspects) // 2
        if fails(suspects[:middle]):
            suspects = suspects[:middle]
        elif fails(suspects[middle:]):
            suspects = suspects[middle:]
        else:
            break  # only together
    return suspects


# -- the same place in other modules -------------------------------------------------------------------------------


class _Peers:
    """Operators at the same place of the forward of modules of the same class."""

    def __init__(self, graph: ChannelGraph, modules: dict[str, nn.Module]) -> None:
        self._graph = graph
        self._modules = modules
        self._at: dict[tuple, list[tuple[Operator, str]]] = {}
        self._signatures: dict[int, tuple[tuple, str]] = {}
        self._anchors: dict[str, tuple[str, str]] = {}

    def of(self, operator: Operator) -> list[Operator]:
        """Return the operators that stand where ``operator`` stands, in other modules."""
        return [peer for peer, _ in self._peers(operator)]

    def same_attribute(
        self, operator: Operator, owner: str, attribute: str, place: Place
    ) -> Iterator[tuple[tuple[str, str], Array]]:
        """Yield ``((module, attribute), labels)`` where a module stands to a peer as ``owner`` to ``operator``."""
        self._index()
        anchor = self._signatures[id(operator)][1]
        if owner != anchor and not owner.startswith(f"{anchor}." if anchor else ""):
            return
        below = owner[len(anchor) :]
        for peer, other in self._peers(operator):
            labels = _at(peer, place)
            module = self._modules.get(other + below)
            if labels is not None and getattr(module, attribute, None) == len(labels):
                yield (other + below, attribute), labels

    def same_group(self, operator: Operator, group: ChannelGroup) -> Iterator[Array]:
        """Yield labels of what makes a group, at the same place of the forwards where peers of ``operator`` stand."""
        self._index()
        prefix = f"{self._signatures[id(operator)][1]}."
        for _, anchor in self._peers(operator):
            for member in group.producers:
                name = f"{anchor}.{member.name[len(prefix) :]}" if member.name.startswith(prefix) else ""
                labels = self._graph.trace.parameters.get(name, [])
                if member.dim < len(labels):
                    array = labels[member.dim]
                    if array is not None and member.indices.max() < len(array):
                        yield array[member.indices.ravel()]

    def _peers(self, operator: Operator) -> list[tuple[Operator, str]]:
        self._index()
        signature, _ = self._signatures[id(operator)]
        return [(peer, anchor) for peer, anchor in self._at[signature] if peer is not operator]

    def _index(self) -> None:
        if self._signatures:
            return
        counts: dict[tuple[str, str], int] = {}
        for operator in self._graph.trace.operators:
            anchor, below = self._anchor(operator.module)
            key = (operator.module, plain_name(operator.name))
            ordinal = counts[key] = counts.get(key, 0) + 1
            signature = (type(self._modules.get(anchor)), below, key[1], ordinal)
            self._signatures[id(operator)] = (signature, anchor)
            self._at.setdefault(signature, []).append((operator, anchor))

    def _anchor(self, name: str) -> tuple[str, str]:
        """Return the nearest module, from ``name`` upwards, that is none of torch's own, and the way down from it."""
        if name not in self._anchors:
            anchor = name
            while anchor and type(self._modules.get(anchor)).__module__.startswith("torch.nn."):
                anchor = anchor.rpartition(".")[0]
            self._anchors[name] = (anchor, name[len(anchor) :])
        return self._anchors[name]

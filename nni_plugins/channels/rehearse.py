"""Rehearsal: what a plan would do to the model is tried on a skeleton, before anything is removed.

A forward may hold sizes: in an attribute (``num_heads``), which then has to follow, or written into it
(``x.view(b, -1, 8)``), so that what would change the size must stay. Both come out where a replay first leaves the
prediction. What one module teaches is taken to hold for the others of its class at the same place of their forward, so
that a deep model takes as many replays as it has kinds of modules, not as many as it has modules.

How many replays there may be is limited, so that the time is, whatever the model: after some more, by which parts of a
plan are tried, what is not known to run stays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from nni_plugins.channels.call import Operator, Path
from nni_plugins.channels.graph import ChannelGraph
from nni_plugins.channels.labels import Array, Cause
from nni_plugins.channels.learn import learn
from nni_plugins.channels.peers import Peers, label_at, shrinking
from nni_plugins.channels.plan import Plan
from nni_plugins.channels.replay import Allowance, Mismatch, Replay, Spent, plain_name

_logger = logging.getLogger(__name__)

FIXED = "its forward holds a fixed size"
SCALED = "its forward computes with a number that follows the size"
LIMITED = "so often did the model not run as predicted that no more was tried"

#: How many replays settle one plan at most; a model that must compute to run takes long for one.
_MOST_RUNS = {"none": 400, "fake": 200, "real": 60}
#: So often one group is looked for that makes an operator fail; after that, twice as many at once each time.
_PATIENCE = {"none": 16, "fake": 8, "real": 4}

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
    graph, _ = settled(graph, model, dummy_input, lambda g: trial_plan(g, inexact=False), in_step=True)
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
            lost = min(-(-lost // group.multiple) * group.multiple, group.size - group.multiple)
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
    in_step: bool = False,
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
    in_step
        Whether units of two groups, of which a forward takes the numbers for one, may be tied.

    Returns
    -------
    tuple
        The graph, with what must stay frozen, and its plan. A model that runs otherwise each time cannot be replayed:
        its graph and plan come back as they are.
    """
    modules = dict(model.named_modules())
    peers = Peers(graph, modules)
    trial = _Trial(model, dummy_input, skip, Allowance(_MOST_RUNS[graph.trace.data]))
    steps = _Steps(trial, modules, peers)
    halvings = 0
    while True:
        plan = plan_of(graph)
        replay = trial.of(plan)
        mismatch: Mismatch | None = None
        try:
            mismatch = replay.run(model)
            while mismatch is not None and not mismatch.scaled:
                better = learn(graph, replay, model, modules, mismatch, peers)
                if better is mismatch:
                    break
                mismatch = better
            if mismatch is None:
                return graph, plan
            stay = _blocks_to_blame(plan, trial, mismatch)
            if stay:
                if on_freeze is not None:
                    on_freeze(mismatch)
                graph = graph.without_blocks(dict.fromkeys(stay, f"the model does not run without it ({mismatch})"))
                continue
            tied = steps.tied(graph, replay, mismatch) if in_step and not mismatch.scaled else None
            if tied is not None:
                graph = tied
                continue
            culprits = [] if innocent or mismatch.scaled else _culprits(replay, mismatch, peers)
            if not culprits:
                halvings += 1
                most = 2 ** max(0, halvings - _PATIENCE[graph.trace.data])
                culprits = _found_by_halving(graph, plan, trial, mismatch, innocent, peers, most)
        except Spent:
            if on_freeze is not None and mismatch is not None:
                on_freeze(mismatch)
            return _as_far_as_known(graph, plan, plan_of, trial, innocent, mismatch)
        if not culprits:
            _logger.warning("the model does not run twice in the same way, so nothing can be rehearsed: %s", mismatch)
            return graph, plan
        if on_freeze is not None:
            on_freeze(mismatch)
        graph = graph.without(culprits)


@dataclass(frozen=True)
class _Trial:
    """What plans are tried on, and how often they may still be."""

    model: nn.Module
    dummy_input: Any
    skip: Collection[str]
    allowance: Allowance

    def of(self, plan: Plan) -> Replay:
        return Replay(plan, self.dummy_input, self.skip, self.allowance)

    def fails(self, plan: Plan, until: int | None = None) -> Mismatch | None:
        return self.of(plan).run(self.model, until)


@dataclass
class _Steps:
    """Ties what a module makes to what it was given, where its forward takes the width of one for that of the other."""

    trial: _Trial
    modules: dict[str, nn.Module]
    peers: Peers
    tried: set[tuple[int, int, int, Path, int]] = field(default_factory=set)
    _place: dict[int, int] = field(default_factory=dict)

    def tied(self, graph: ChannelGraph, replay: Replay, mismatch: Mismatch) -> ChannelGraph | None:
        """Return the graph with a tie by which the view that fails does not; None where there is none."""
        operator = mismatch.operator
        if operator is None or plain_name(operator.name) != "aten.view":
            return None
        for first, last, made in self._made(graph, operator):
            for path, dim, given in self._given(graph, operator):
                key = (id(operator), first, last, path, dim)
                if len(given) != len(made) or key in self.tried:
                    continue
                self.tried.add(key)
                pairs = [(made, given)]
                for peer in self.peers.of(operator):
                    there = [m for f, to, m in self._made(graph, peer) if (f, to) == (first, last)]
                    along = [g for p, d, g in self._given(graph, peer) if (p, d) == (path, dim)]
                    pairs += [(m, g) for m, g in zip(there, along, strict=False) if len(m) == len(g)]
                after = graph.tied(pairs)
                if replay.kept(len(made), made) != replay.kept(len(given), given) and self._runs(
                    after, made, mismatch.index
                ):
                    return after
        return None

    def _given(self, graph: ChannelGraph, operator: Operator) -> Iterator[tuple[Path, int, Array]]:
        """Yield the labels of what the module whose forward calls ``operator`` was given."""
        if not self._place:
            self._place.update({id(op): place for place, op in enumerate(graph.trace.operators)})
        place = self._place[id(operator)]
        for span in graph.trace.spans:
            if span.module == operator.module and span.start <= place < span.end:
                for path, info in span.arguments:
                    for dim, labels in enumerate(info.labels):
                        if labels is not None:
                            yield path, dim, labels
                return

    @staticmethod
    def _made(graph: ChannelGraph, operator: Operator) -> Iterator[tuple[int, int, Array]]:
        """Yield the labels of the dimensions of an operator's result, and of two in a row that are one elsewhere."""
        labels = operator.outputs[0].labels
        for dim, own in enumerate(labels):
            if own is not None:
                yield dim, dim, own
                after = labels[dim + 1] if dim + 1 < len(labels) else None
                both = graph.trace.labels.product_of(own, after) if after is not None else None
                if both is not None:
                    yield dim, dim + 1, both

    def _runs(self, graph: ChannelGraph, made: Array, index: int) -> bool:
        """Whether the model runs beyond an operator without some of the units that are tied."""
        classes = graph.solution.classes[made]
        groups = {g.name for g in graph.groups if g.prunable and np.isin(g.classes, classes).any()}
        kept = {name: units for name, units in trial_plan(graph, inexact=True).kept.items() if name in groups}
        if not kept:
            return False
        replay = self.trial.of(Plan(graph, kept))
        mismatch = replay.run(self.trial.model)
        while mismatch is not None and mismatch.index <= index and not mismatch.scaled:
            better = learn(graph, replay, self.trial.model, self.modules, mismatch, self.peers)
            if better is mismatch:
                break
            mismatch = better
        return mismatch is None or mismatch.index > index


def _as_far_as_known(
    graph: ChannelGraph,
    plan: Plan,
    plan_of: PlanOf,
    trial: _Trial,
    innocent: Collection[str],
    mismatch: Mismatch | None,
) -> tuple[ChannelGraph, Plan]:
    """Return the graph in which all that is not known to run stays, named by the operator that failed last.

    Half as many replays again find out what does run: ever smaller parts of the plan are added to what is known to.
    """
    operator = mismatch.operator if mismatch is not None else None
    cause = Cause(operator.module, operator.name, LIMITED) if operator is not None else Cause("", "", LIMITED)
    trial = replace(trial, allowance=Allowance(_MOST_RUNS[graph.trace.data] // 2))
    runs = [name for name in plan.kept if name in innocent]
    names = [name for name in plan.kept if name not in innocent]
    middle = len(names) // 2
    waiting = [names[:middle], names[middle:]]
    with suppress(Spent):
        while waiting:
            part = waiting.pop(0)
            if not part:
                continue
            if trial.fails(Plan(graph, {name: plan.kept[name] for name in (*runs, *part)})) is None:
                runs += part
            elif len(part) > 1:
                middle = len(part) // 2
                waiting += [part[:middle], part[middle:]]
    graph = graph.without_blocks(dict.fromkeys(plan.blocks, LIMITED))
    for stays in ([name for name in names if name not in runs], names):
        less = graph.without([(graph.labels_of(name), cause) for name in stays])
        rest = plan_of(less)
        if stays == names or Replay(rest, trial.dummy_input, trial.skip).run(trial.model) is None:
            break  # what stays may have changed what else can go
    _logger.warning("%s, and %d of %d groups stay: %s", LIMITED, len(stays), len(plan.kept), mismatch)
    return less, rest


# -- groups that must stay -----------------------------------------------------------------------------------------


def _culprits(replay: Replay, mismatch: Mismatch, peers: Peers) -> list[tuple[Array, Cause]]:
    """Return the labels to freeze so that a mismatch cannot come back, there and at the same place of peers."""
    if mismatch.operator is None:
        return []
    outputs = len(mismatch.operator.outputs)
    wrong = {i for i, info in enumerate(mismatch.operator.outputs) if replay.predicted(info) != info.shape}
    found = []
    for place, _ in shrinking(replay, mismatch.operator):
        if place[0] >= outputs or place[0] in wrong or not wrong:
            for operator in [mismatch.operator, *peers.of(mismatch.operator)]:
                labels = label_at(operator, place)
                if labels is not None:
                    found.append((labels, Cause(operator.module, operator.name, FIXED)))
    return found


def _found_by_halving(
    graph: ChannelGraph,
    plan: Plan,
    trial: _Trial,
    mismatch: Mismatch,
    innocent: Collection[str],
    peers: Peers,
    most: int,
) -> list[tuple[Array, Cause]]:
    """Find up to ``most`` groups that make an operator fail, where it does not name them.

    Where a number follows their size, so it does at the same place of peers.
    """

    def fails(names: Sequence[str]) -> bool:
        wanted = {name: plan.kept[name] for name in plan.kept if name in names or name in innocent}
        return trial.fails(Plan(graph, wanted, plan.blocks), until=mismatch.index) is not None

    suspects = [name for name in plan.kept if name not in innocent]
    if not suspects or fails([]):
        return []
    suspects = _fewest(suspects, fails, most)
    operator = mismatch.operator
    if operator is None:
        return [(graph.labels_of(name), Cause("", "", FIXED)) for name in suspects]
    cause = Cause(operator.module, operator.name, SCALED if mismatch.scaled else FIXED)
    found = [(graph.labels_of(name), cause) for name in suspects]
    for name in suspects if mismatch.scaled else ():
        found += [(labels, cause) for labels in peers.same_group(operator, graph.group(name))]
    return found


def _blocks_to_blame(plan: Plan, trial: _Trial, mismatch: Mismatch) -> list[str]:
    """Find blocks whose removal makes a plan fail at ``mismatch`` or before: without them, nothing fails so early."""
    operators = plan.graph.trace.operators

    def place(of: Mismatch) -> int:
        return next((i for i, operator in enumerate(operators) if operator is of.operator), len(operators))

    def fails(names: Sequence[str]) -> bool:
        again = trial.fails(Plan(plan.graph, plan.kept, names))
        return again is not None and place(again) <= place(mismatch)

    return [] if not plan.blocks or fails([]) else _fewest(list(plan.blocks), fails)


def _fewest(suspects: list[str], fails: Callable[[Sequence[str]], bool], most: int = 1) -> list[str]:
    """Halve suspects for as long as one half fails by itself, until no more than ``most`` are left."""
    while len(suspects) > most:
        middle = len(suspects) // 2
        if fails(suspects[:middle]):
            suspects = suspects[:middle]
        elif fails(suspects[middle:]):
            suspects = suspects[middle:]
        else:
            break  # only together
    return suspects

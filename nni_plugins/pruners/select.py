"""Which units go: the second of the three questions of pruning, written once for every method.

``select`` takes scores and pools (the groups that share a budget) and returns the units to keep. The chain
of :mod:`~nni_plugins.pruners.chain` orders the units; a bisection finds the first state under the budget; a
repair gives back units, the most important first, while the budget still holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd, lcm
from typing import TYPE_CHECKING

import numpy as np

from nni_plugins.pruners.affine import transformed
from nni_plugins.pruners.chain import Chain, GroupRanking, normalised
from nni_plugins.pruners.errors import BudgetError
from nni_plugins.pruners.knapsack import group_losses, knapsack, lost_importance
from nni_plugins.pruners.targets import TARGETS, unit_costs

if TYPE_CHECKING:
    from nni_plugins.channels import ChannelGraph, ChannelGroup
    from nni_plugins.channels.latency import LatencyTable

Kept = Mapping[str, int]
_PAIRS = 2000  # of groups, whose exchange is tried where single steps are too coarse
_ROUNDS = 12  # of the pools in turn, when the cost of one depends on the others


@dataclass(frozen=True)
class Pool:
    """Groups under one budget.

    Parameters
    ----------
    name : str
        What asked for it, for messages: ``config_list[0]``.
    groups : tuple of str
        Names of the channel groups.
    sparsity : float or None
        Fraction of the cost to remove.
    threshold : float or None
        Instead of a budget: units whose score is below it go.
    scope : {'local', 'global', 'isomorphic', 'knapsack'}
        How the units are ranked within the pool.
    modules : frozenset of str or None
        The modules whose MACs, parameters or latency the budget counts; None for the whole model.
    bounds : mapping of str to (float, float)
        Least and greatest fraction that each group may lose.
    classes : mapping of str to hashable
        For the isomorphic scope: groups with equal values are ranked together.
    latency : LatencyTable, optional
        What the target ``latency`` is read from.
    final : float, optional
        Where the sparsity is that of a step on the way: what is asked in the end, which no step may overshoot.
    whole : float, optional
        The cost that the tolerance is a fraction of, and messages speak of, where it is not the present one.
    """

    name: str
    groups: tuple[str, ...]
    sparsity: float | None = None
    threshold: float | None = None
    scope: str = "local"
    modules: frozenset[str] | None = None
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    classes: Mapping[str, Hashable] = field(default_factory=dict)
    latency: LatencyTable | None = None
    final: float | None = None
    whole: float | None = None


def unit_multiple(group: ChannelGroup, round_to: int) -> int:
    """Number of units whose channels are a multiple of ``round_to``, and as many as a kernel takes.

    A unit may own several channels.
    """
    repeat = next((member.indices.shape[1] for member in group.members if member.role == "out"), 1)
    return lcm(round_to // gcd(round_to, max(repeat, 1)), group.multiple)


class _PoolSearch:
    """The search of one pool for its budget, the other pools being as they are."""

    def __init__(
        self,
        graph: ChannelGraph,
        pool: Pool,
        rankings: Sequence[GroupRanking],
        *,
        target: str,
        tolerance: float,
    ):
        self.graph, self.pool, self.target, self.tolerance = graph, pool, target, tolerance
        self.chain = Chain(rankings, pool.scope)
        self.state = self.chain.state(0)
        self.base = TARGETS[target](graph, {}, pool)
        self.sparsity = sparsity = self._within_bounds(pool.sparsity or 0.0)
        self.near = tolerance * (self.base if pool.whole is None else pool.whole)
        self.exact = self.budget = (1.0 - sparsity) * self.base * (1 + 1e-12)
        if target == "channels":  # a number of channels is whole: the nearest one, and of two the one that keeps more
            self.budget = float(np.floor(self.exact + 0.5))
            self.near = max(self.near, 0.5)
        self.least = 0.0  # a coarse unit that goes too early cannot come back
        if pool.final is not None:
            self.least = (1.0 - self._within_bounds(pool.final)) * self.base - self.near

    def _within_bounds(self, sparsity: float) -> float:
        """Of channels, as NNI: the ratio gives way to the bounds."""
        if self.target != "channels" or not self.base:
            return sparsity
        sizes = {r.name: len(r.scores) for r in self.chain.rankings}
        least, most = (
            sum(self.pool.bounds.get(name, (0.0, 1.0))[side] * size for name, size in sizes.items()) for side in (0, 1)
        )
        return min(max(sparsity, least / self.base), most / self.base)

    def cost(self, state: np.ndarray, others: Kept) -> float:
        return TARGETS[self.target](self.graph, {**others, **self.kept(state)}, self.pool)

    def kept(self, state: np.ndarray) -> dict[str, int]:
        sizes = {ranking.name: len(ranking.scores) for ranking in self.chain.rankings}
        return {name: sizes[name] - removed for name, removed in self.chain.removed(state).items()}

    def solve(self, others: Kept) -> None:
        """Set ``state`` to the one that lands nearest under the budget, or at the end of the chain."""
        low, high = 0, len(self.chain)
        while low < high:
            middle = (low + high) // 2
            if self.cost(self.chain.state(middle), others) <= self.budget:
                high = middle
            else:
                low = middle + 1
        self.state = self.chain.state(low)
        if low == 0:
            return
        if self.pool.scope == "knapsack":
            self._pack(others)
        self._give_back(others)
        if self._distance(self.state, others)[0] > 0:
            self._step_differently(low, others)

    def _pack(self, others: Kept) -> None:
        """Exchange the state for the knapsack's, where that loses less importance."""
        found = knapsack(self.chain, lambda state: self.cost(state, others), self.budget)
        losses = group_losses(self.chain)
        if found is not None and lost_importance(losses, found) < lost_importance(losses, self.state):
            self.state = found

    def _gap(self, state: np.ndarray, others: Kept) -> float:
        """Cost left unused under the budget (negative: over it)."""
        return self.budget - self.cost(state, others)

    def _give_back(self, others: Kept) -> None:
        """Undo events, the last of the chain first, while the budget holds."""
        fine = self.base * self.tolerance / 10
        gap = self._gap(self.state, others)
        changed = gap >= 0
        while changed and gap > fine:
            changed = False
            for group in self._latest(self.state):
                trial = self.state.copy()
                trial[group] -= 1
                left = self._gap(trial, others)
                if 0 <= left < gap:
                    self.state, gap, changed = trial, left, True
                    if gap <= fine:
                        break

    def _latest(self, state: np.ndarray) -> list[int]:
        """Groups that have lost something, the one whose last event is latest in the chain first."""
        losers = np.flatnonzero(state)
        latest = [self.chain.positions[group][state[group] - 1] for group in losers]
        return [int(losers[i]) for i in np.argsort(latest)[::-1]]

    def _step_differently(self, position: int, others: Kept) -> None:
        """When one event jumps too far under the budget: look for a state nearby that lands nearer.

        Under the budget is preferred; over it, within the tolerance, is accepted where nothing else is near.
        """
        starts = [self.state, self.chain.state(position - 1)]
        trials = itertools.chain(starts, *(self._neighbours(start) for start in starts))
        self.state = min(trials, key=lambda trial: self._distance(trial, others))

    def _distance(self, state: np.ndarray, others: Kept) -> tuple[int, float]:
        """How far from the asked: first whether near and under, near and over, under, or over; then by how much."""
        cost = self.cost(state, others)
        under, off = cost <= self.budget, abs(cost - self.exact)
        if cost < self.least:
            return 4, off
        return (0 if under else 1) + (0 if off <= self.near else 2), off

    def _neighbours(self, state: np.ndarray) -> Iterator[np.ndarray]:
        """States with one event more or less in a group, and in few groups also one more here and one less there."""
        more = [g for g, events in enumerate(self.chain.positions) if state[g] < len(events)]
        less = [int(g) for g in np.flatnonzero(state)]
        steps = [{g: 1} for g in more] + [{g: -1} for g in less]
        if len(more) * len(less) <= _PAIRS:
            steps += [{g: 1, h: -1} for g in more for h in less if g != h]
        for step in steps:
            trial = state.copy()
            for group, change in step.items():
                trial[group] += change
            yield trial

    def check(self, others: Kept) -> None:
        """Raise a BudgetError where the final state misses the budget."""
        cost, whole = self.cost(self.state, others), self.base if self.pool.whole is None else self.pool.whole
        asked, removed = (1.0 - left / whole if whole else 0.0 for left in ((1.0 - self.sparsity) * self.base, cost))
        over, near = cost - self.exact, self.near
        what = f"{self.pool.name}: sparsity {asked:g} of {self.target}"
        if over > near:
            text = f"{what} is out of reach: at most {removed:.4g} can go; {self._limits(others)}"
            raise BudgetError(text, asked, removed)
        if over < -near and self.state.any():
            fewer = self.state.copy()
            fewer[self._latest(self.state)[0]] -= 1
            above = 1.0 - self.cost(fewer, others) / whole
            raise BudgetError(
                f"{what} cannot be met within {self.tolerance:.0%}: the nearest are {above:.4g} and {removed:.4g}; "
                "ask for one of these, lower round_to, or give a larger tolerance",
                asked,
                removed,
            )

    def _limits(self, others: Kept) -> str:
        """What keeps the cost up, in half a line."""
        reasons = []
        rankings = self.chain.rankings
        stuck = [r.name for r, counts in zip(rankings, self.chain.counts, strict=True) if len(counts) == 1]
        if stuck:
            reasons.append(
                f"{len(stuck)} groups cannot lose a unit (size, round_to or max_sparse_ratio), as {stuck[0]}"
            )
        if any(r.upper < 1.0 for r in rankings):
            reasons.append("max_sparse_ratio")
        if any(r.multiple > 1 for r in rankings):
            reasons.append("round_to")
        if self.target != "channels":
            costs = self._module_costs({**others, **self.kept(self.state)})
            name = max(costs, key=lambda module: costs[module])
            reasons.append(f"{name} holds {costs[name] / (sum(costs.values()) or 1):.0%} of what stays")
        pruned = len(rankings) - len(stuck)
        return f"limited by: {', '.join([*reasons, f'{pruned} prunable groups, each of which keeps a unit'])}"

    def _module_costs(self, kept: Kept) -> dict[str, float]:
        if self.target == "latency" and self.pool.latency is not None:
            return {**self.pool.latency.modules(kept), "Python's overhead": self.pool.latency.overhead_ms}
        position = 0 if self.target == "macs" else 1
        return {name: float(cost[position]) for name, cost in self.graph.cost(kept).modules.items()}


def select(
    graph: ChannelGraph,
    pools: Sequence[Pool],
    scores: Mapping[str, np.ndarray],
    *,
    target: str = "channels",
    round_to: int = 1,
    normalise: str | None = "mean",
    dead: Mapping[str, np.ndarray] | None = None,
    affine: Mapping[str, tuple[float, float]] | None = None,
    tolerance: float = 0.02,
    strict: bool = True,
) -> dict[str, np.ndarray]:
    """Choose the units to keep so that each pool meets its budget.

    Parameters
    ----------
    graph : ChannelGraph
        The channels and their cost.
    pools : sequence of Pool
        Groups under one budget; a group is in one pool at most.
    scores : mapping of str to numpy.ndarray
        Importance of each unit, float [size] by group name.
    target : {'channels', 'macs', 'params', 'latency'}
        What the budget counts.
    round_to : int
        The channels kept of each group are a multiple of this (or all of them).
    normalise : {'mean', 'l2', 'max', 'cost', None}
        How scores of different groups are made comparable (see :func:`normalised`); ``cost`` divides them by what
        a unit costs of the target, so that what goes is what is least important for what it saves.
    dead : mapping of str to numpy.ndarray, optional
        Bool [size]: units of any group that are gone already. They stay gone and count as removed.
    affine : mapping of str to (float, float), optional
        Changes comparable scores by group name (see :func:`~nni_plugins.pruners.affine.transformed`).
    tolerance : float
        How far from the budget, as a fraction of the dense cost, is near enough.
    strict : bool
        Whether to raise where a budget is missed; else the nearest state is taken.

    Returns
    -------
    dict of str to numpy.ndarray
        Bool [size] by group name, True where kept, for every group that loses a unit.

    Raises
    ------
    BudgetError
        A budget cannot be met: asked, reachable and what limits it.
    """
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}; it must be one of {', '.join(TARGETS)}")
    dead = dict(dead or {})
    groups = {group.name: group for group in graph.groups}
    comparable = normalised(scores, dead, None if normalise == "cost" else normalise)
    kept = {name: ~gone for name, gone in dead.items() if gone.any()}
    if normalise == "cost":
        now = {name: int(mask.sum()) for name, mask in kept.items()}
        for pool in pools:
            for name, cost in unit_costs(graph, pool, target, now).items():
                comparable[name] = comparable[name] / cost
    comparable = transformed(comparable, dead, affine or {})

    def ranking(name: str, pool: Pool) -> GroupRanking:
        group = groups[name]
        values = np.asarray(comparable[name], dtype=np.float64)
        if not np.isfinite(values).all():
            raise BudgetError(f"{name}: its scores are not finite, so nothing can be ranked", pool.sparsity or 0.0, 0.0)
        lower, upper = pool.bounds.get(name, (0.0, 1.0))
        gone = dead.get(name, np.zeros(group.size, dtype=bool))
        return GroupRanking(name, values, gone, lower, upper, unit_multiple(group, round_to), pool.classes.get(name))

    searches = []
    for pool in pools:
        if pool.threshold is not None:
            for name in pool.groups:
                raw = scores if pool.scope == "local" else comparable
                kept[name] = _above(np.asarray(raw[name]), ranking(name, pool), pool.threshold)
        else:
            rankings = [ranking(name, pool) for name in pool.groups]
            searches.append(_PoolSearch(graph, pool, rankings, target=target, tolerance=tolerance))
    fixed = {name: int(mask.sum()) for name, mask in kept.items()}

    def others(this: _PoolSearch) -> dict[str, int]:
        merged = dict(fixed)
        for search in searches:
            if search is not this:
                merged.update(search.kept(search.state))
        return merged

    rounds = 1 if target == "channels" or len(searches) == 1 else _ROUNDS
    for _ in range(rounds):
        before = [search.state.copy() for search in searches]
        for search in searches:
            search.solve(others(search))
        if all(np.array_equal(old, search.state) for old, search in zip(before, searches, strict=True)):
            break
    for search in searches:
        if strict:
            search.check(others(search))
        kept.update(search.chain.keep_masks(search.state))
    return {name: mask for name, mask in kept.items() if not mask.all()}


def _above(scores: np.ndarray, ranking: GroupRanking, threshold: float) -> np.ndarray:
    """Keep mask of the units whose score reaches the threshold, within the group's bounds and rounding."""
    order, counts = ranking.removal_order(), ranking.counts()
    below = int(((scores < threshold) | ranking.dead).sum())
    allowed = counts[counts <= below]
    mask = np.ones(len(scores), dtype=bool)
    mask[order[: allowed[-1] if len(allowed) else counts[0]]] = False
    return mask

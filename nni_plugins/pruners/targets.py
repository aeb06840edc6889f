"""What a budget counts: channels, multiply-accumulates, parameters, or milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nni_plugins.pruners import chain
from nni_plugins.pruners.errors import PruningError

if TYPE_CHECKING:
    from nni_plugins.channels import ChannelGraph
    from nni_plugins.channels.latency import LatencyTable
    from nni_plugins.pruners.select import Pool

Kept = Mapping[str, int]


def _channels(graph: ChannelGraph, kept: Kept, pool: Pool) -> float:
    sizes = {group.name: group.size for group in graph.groups}
    return float(sum(kept.get(name, sizes[name]) for name in pool.groups))


def _counted(position: int) -> Callable[[ChannelGraph, Kept, Pool], float]:
    def cost(graph: ChannelGraph, kept: Kept, pool: Pool) -> float:
        if pool.modules is None:
            return graph.cost_model.totals(graph.cost_model.counts(kept))[position]
        modules = graph.cost(kept).modules
        return float(sum(modules[name][position] for name in pool.modules if name in modules))

    return cost


def _latency_ms(graph: ChannelGraph, kept: Kept, pool: Pool) -> float:
    if pool.latency is None:
        raise ValueError(f"{pool.name}: the target is latency, but no latency table is given")
    if pool.modules is None:
        return pool.latency.total_ms(graph.cost_model.counts(kept))
    modules = pool.latency.modules(kept)
    return float(sum(modules[name] for name in pool.modules if name in modules))


TARGETS: dict[str, Callable[[ChannelGraph, Kept, Pool], float]] = {
    "channels": _channels,
    "macs": _counted(0),
    "params": _counted(1),
    "latency": _latency_ms,
}
"""What a budget counts, by name: a function of the graph, the units kept of each group, and the pool."""


NORMALISATIONS = (*chain.NORMALISATIONS, "cost")


def latency_table(graph: ChannelGraph, model: nn.Module, dummy_input: Any, given: LatencyTable | None) -> LatencyTable:
    """The given latency table, checked; or the model's, for the threads that torch has now, measured or remembered."""
    if given is None:
        from nni_plugins.channels.latency import LatencyTable

        return LatencyTable.measure(graph, model, dummy_input, threads=torch.get_num_threads())
    if [group.name for group in given.graph.groups] != [group.name for group in graph.groups]:
        raise PruningError("latency: the table is of another model; measure one of this model, or give none")
    if not given.has_curves:
        raise PruningError("latency: the table knows no smaller model; measure it with curves=True, or give none")
    return given


def unit_costs(graph: ChannelGraph, pool: Pool, target: str, kept: Kept) -> dict[str, float]:
    """What a unit of each group of a pool costs now: the mean over the half of its units that would go first.

    Parameters
    ----------
    kept : mapping of str to int
        Units that groups have left.

    Returns
    -------
    dict of str to float
        Of the target's own measure; more than 0 throughout.
    """
    now, sizes = TARGETS[target](graph, kept, pool), {group.name: group.size for group in graph.groups}
    costs = {}
    for name in pool.groups:
        left = kept.get(name, sizes[name])
        fewer = max(1, left // 2)
        saved = now - TARGETS[target](graph, {**kept, name: fewer}, pool)
        costs[name] = max(saved / max(1, left - fewer), 1e-9 * max(now, 1e-9))
    return costs

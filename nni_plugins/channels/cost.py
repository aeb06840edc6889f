"""Cost: multiply-accumulates and parameters, as a function of how much of each group is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from nni_plugins.channels.labels import Array

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from nni_plugins.channels.graph import ChannelGraph
    from nni_plugins.channels.groups import ChannelGroup
    from nni_plugins.channels.removal import Removal


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one run and number of parameters; ``modules`` maps names to ``(macs, params)``."""

    macs: int
    params: int
    modules: dict[str, tuple[int, int]] = field(default_factory=dict)


class CostModel:
    """Every factor of every term (the size of a dimension) as a linear function of the groups' kept counts.

    One evaluation is one sparse matrix product and one product per term, microseconds for hundreds of groups, so a
    budget search can afford thousands.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self._graph = graph
        self._groups = graph.groups
        self._index = {group.name: i for i, group in enumerate(graph.groups)}
        self._sizes = np.array([group.size for group in graph.groups], dtype=np.float64)
        self._classes = graph.solution.classes
        group_of = np.full(len(graph.solution), -1, dtype=np.int64)
        for i, group in enumerate(graph.groups):
            if group.prunable:
                group_of[group.classes] = i
        self._group_of = group_of
        self._rows: dict[int, int] = {}
        self._arrays: list[Array] = []
        self._parameters = [name for name in graph.shapes if not graph.is_buffer[name]]
        self._terms = [
            (t.module, t.coefficient, [self._row(a) for a in t.factors], True) for t in graph.trace.terms
        ] + [self._parameter_term(graph, name) for name in self._parameters]
        self._pack()

    def _parameter_term(self, graph: ChannelGraph, name: str) -> tuple[str, float, list[int], bool]:
        arrays = [a for a in graph.trace.parameters.get(name, []) if a is not None]
        rest = float(np.prod(graph.shapes[name])) / float(np.prod([len(a) for a in arrays]))
        return name.rpartition(".")[0], rest, [self._row(a) for a in arrays], False

    def _row(self, array: Array) -> int:
        row = self._rows.get(id(array))
        if row is None:
            row = self._rows[id(array)] = len(self._arrays)
            self._arrays.append(array)
        return row

    @cached_property
    def _linear(self) -> tuple[csr_matrix, Array]:
        """Every factor's size as a matrix to multiply the kept counts with, and a constant to add."""
        from scipy.sparse import csr_matrix

        rows = []
        for array in self._arrays:
            owners = self._group_of[self._classes[array]]
            found, counts = np.unique(owners[owners >= 0], return_counts=True)
            rows.append((float((owners < 0).sum()), found, counts / self._sizes[found]))
        pointer = np.r_[0, np.cumsum([len(found) for _, found, _ in rows])].astype(np.int64)
        columns = np.concatenate([f for _, f, _ in rows]) if rows else np.zeros(0, dtype=np.int64)
        values = np.concatenate([v for _, _, v in rows]) if rows else np.zeros(0)
        matrix = csr_matrix((values, columns, pointer), shape=(len(rows), len(self._groups)))
        return matrix, np.array([constant for constant, _, _ in rows])

    def _factor_sizes(self, kept: Array) -> Array:
        matrix, constant = self._linear
        return np.asarray(matrix @ kept + constant)

    def _pack(self) -> None:
        width = max((len(rows) for _, _, rows, _ in self._terms), default=0)
        one = len(self._arrays)  # a row that is always 1, to fill up
        self._factors = np.full((len(self._terms), max(width, 1)), one, dtype=np.int64)
        for i, (_, _, rows, _) in enumerate(self._terms):
            self._factors[i, : len(rows)] = rows
        self._coefficients = np.array([c for _, c, _, _ in self._terms])
        self._is_macs = np.array([m for _, _, _, m in self._terms], dtype=bool)

    def _evaluate(self, sizes: Array) -> Array:
        return self._coefficients * np.append(sizes, 1.0)[self._factors].prod(axis=1)

    def totals(self, kept: Array) -> tuple[float, float]:
        """Return ``(macs, params)`` where group ``i`` keeps ``kept[i]`` units: the fast form for searches."""
        values = self._evaluate(self._factor_sizes(kept))
        return float(values[self._is_macs].sum()), float(values[~self._is_macs].sum())

    def counts(self, kept: Mapping[str, int] | None) -> Array:
        """Return the kept count of every group as a vector, in the order of ``graph.groups``."""
        counts = self._sizes.copy()
        for name, count in (kept or {}).items():
            self._graph.group(name)  # raises, with a hint, where there is none
            counts[self._index[name]] = count
        return counts

    def cost(self, kept: Mapping[str, int] | None, removal: Removal | None = None) -> Cost:
        if not kept:  # each factor has the size that it has
            values = self._evaluate(np.array([float(len(array)) for array in self._arrays]))
        else:
            values = self._evaluate(self._factor_sizes(self.counts(kept)))
        return self._as_cost(values * self._stays(removal))

    def exact_cost(self, keep_class: Array, removal: Removal | None = None) -> Cost:
        """Return the cost where the classes of labels in ``keep_class`` (bool per class) are kept."""
        keep = keep_class[self._classes]
        values = self._evaluate(np.array([float(keep[a].sum()) for a in self._arrays]))
        return self._as_cost(values * self._stays(removal))

    def _stays(self, removal: Removal | None) -> Array:
        """Which terms are still there when whole modules are removed."""
        if removal is None or not removal.modules:
            return np.ones(len(self._terms))
        run = [not removal.operators[term.operator] for term in self._graph.trace.terms]
        return np.array([*run, *(name not in removal.parameters for name in self._parameters)], dtype=np.float64)

    def group_cost(self, group: ChannelGroup) -> Cost:
        if group.prunable:
            column = self._linear[0][:, [self._index[group.name]]].toarray().ravel() > 0
        else:  # it has no column, since it never changes
            own = np.zeros(len(self._group_of), dtype=bool)
            own[group.classes] = True
            column = np.array([own[self._classes[array]].any() for array in self._arrays], dtype=bool)
        touched = np.append(column, False)[self._factors].any(axis=1)
        values = self._evaluate(self._factor_sizes(self._sizes))
        return self._as_cost(np.where(touched, values, 0.0))

    def _as_cost(self, values: Array) -> Cost:
        modules: dict[str, tuple[int, int]] = {}
        for (module, _, _, is_macs), value in zip(self._terms, np.rint(values).astype(np.int64).tolist(), strict=True):
            macs, params = modules.get(module, (0, 0))
            modules[module] = (macs + value, params) if is_macs else (macs, params + value)
        return Cost(sum(m for m, _ in modules.values()), sum(p for _, p in modules.values()), modules)

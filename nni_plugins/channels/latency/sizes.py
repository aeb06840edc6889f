"""How much of each dimension is left, as a linear function of how many units the groups keep."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix

from nni_plugins.channels.graph import ChannelGraph
from nni_plugins.channels.labels import Array, MaybeLabels

#: The row of a dimension that never shrinks.
CONSTANT = -1


class Sizes:
    """Rows of a matrix: row times kept counts, plus a constant, is the fraction of a dimension that is left.

    Dimensions that shrink alike (channels, and the flattened channels times positions) share a row.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self._classes = graph.solution.classes
        self._full = np.array([group.size for group in graph.groups], dtype=np.float64)
        self._owner = np.full(len(graph.solution), CONSTANT, dtype=np.int64)
        for index, group in enumerate(graph.groups):
            self._owner[group.classes] = index
        self._shrinks = np.array([group.prunable for group in graph.groups], dtype=bool)
        self._by_array: dict[int, tuple[Array, int, frozenset[int]]] = {}
        self._by_value: dict[tuple, int] = {}
        self._constants: list[float] = []
        self._columns: list[tuple[Array, Array]] = []

    def __len__(self) -> int:
        return len(self._constants)

    def row(self, labels: MaybeLabels) -> int:
        """Return the row of a dimension that carries ``labels``, or CONSTANT."""
        return self._look(labels)[0]

    def groups(self, labels: MaybeLabels) -> frozenset[int]:
        """Return the groups, prunable or not, whose units lie in a dimension that carries ``labels``."""
        return self._look(labels)[1]

    def _look(self, labels: MaybeLabels) -> tuple[int, frozenset[int]]:
        if labels is None or not len(labels):
            return CONSTANT, frozenset()
        known = self._by_array.get(id(labels))
        if known is not None:
            return known[1:]
        owners = self._owner[self._classes[labels]]
        groups, counts = np.unique(owners[owners >= 0], return_counts=True)
        found = frozenset(groups.tolist())
        groups, counts = groups[self._shrinks[groups]], counts[self._shrinks[groups]]
        row = CONSTANT
        if len(groups):
            shares = counts / len(labels)
            value = (tuple(groups.tolist()), tuple(np.round(shares, 9).tolist()))
            row = self._by_value.setdefault(value, len(self._constants))
            if row == len(self._constants):
                self._constants.append(1.0 - float(shares.sum()))
                self._columns.append((groups, shares / self._full[groups]))
        self._by_array[id(labels)] = (labels, row, found)  # the array too, else its id may be given to another
        return row, found

    def pack(self) -> tuple[csr_matrix, Array]:
        """Return ``(matrix, constants)``: ``matrix @ kept + constants`` are the fractions that are left."""
        pointer = np.r_[0, np.cumsum([len(groups) for groups, _ in self._columns])].astype(np.int64)
        columns = np.concatenate([np.zeros(0, dtype=np.int64), *(groups for groups, _ in self._columns)])
        values = np.concatenate([np.zeros(0), *(shares for _, shares in self._columns)])
        return csr_matrix((values, columns, pointer), shape=(len(self), len(self._full))), np.array(self._constants)

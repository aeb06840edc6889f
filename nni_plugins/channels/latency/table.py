"""The latency table: what a run of a model takes, as a function of how many units its groups keep."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack
from torch import nn

from nni_plugins.channels.labels import Array
from nni_plugins.channels.latency.cache import Cache, cache_folder, machine
from nni_plugins.channels.latency.clock import Clock
from nni_plugins.channels.latency.curves import Curves
from nni_plugins.channels.latency.entries import CallOf, Entry, Progress, Timer, entries_of
from nni_plugins.channels.latency.operators import record
from nni_plugins.channels.latency.sizes import Sizes

if TYPE_CHECKING:
    from nni_plugins.channels.graph import ChannelGraph, ChannelGroup

_CALLS = 2  # so many times a bare call from Python is what a model's code takes around an operator, at most


class LatencyTable:
    """Latency of a model for any kept counts, from times of its operators on this machine.

    Make one by :meth:`measure`. Each operator is timed within the model's run, and alone at several sizes; its time in
    a smaller model is the former, times what the latter say of the smaller size. What the model's own Python code takes
    (``overhead_ms``) does not shrink.

    Attributes
    ----------
    measured_ms
        Time of the model's run as it is.
    overhead_ms
        What of it is not in the operators.
    machine
        What the times are true of: processor, torch, threads and settings.
    taken
        How many times were taken by :meth:`measure`, and not known from before.
    seconds
        How long :meth:`measure` took.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        sizes: Sizes,
        entries: list[Entry],
        calls: list[CallOf],
        measured_ms: float,
        timer: Timer,
        curves: bool,
    ) -> None:
        self.graph = graph
        self.measured_ms = measured_ms
        self.machine = timer.cache.machine
        self.taken = timer.cache.taken
        self.seconds = 0.0
        self._entries, self._calls, self._timer = entries, calls, timer
        self._counts = np.array([entry.count for entry in entries], dtype=np.float64)
        self.overhead_ms, self._full_ms = _shared_out(
            entries, measured_ms, self._counts, len(calls) * _CALLS * timer.clock.call_ms
        )
        self._all = graph.cost_model.counts(None)
        self._rows, self._row_constants = sizes.pack()
        self._has_curves = curves
        self._moving = np.array([i for i, entry in enumerate(entries) if entry.curve is not None], dtype=np.int64)
        self._curves = Curves([entry.curve for entry in entries if entry.curve is not None])
        self._pack([entries[index] for index in self._moving])

    @classmethod
    def measure(
        cls,
        graph: ChannelGraph,
        model: nn.Module,
        dummy_input: Any,
        *,
        threads: int = 1,
        curves: bool = True,
        seconds: float = 60.0,
        cache: Path | str | bool = True,
        fresh: bool = False,
        progress: Progress | None = None,
    ) -> LatencyTable:
        """Time the operators of a model, unless they are known of this machine already, and return its table.

        Parameters
        ----------
        graph
            The channel graph of ``model``, watched on ``dummy_input``.
        model
            It is run in eval mode, on its own device, and left as it was.
        dummy_input
            A tensor, a tuple or list of positional arguments, or a dict of keyword arguments, on the model's device.
        threads
            CPU threads of a run.
        curves
            Time operators at smaller sizes too. Without, the table is made in the time of some runs and gives shares of
            modules and groups, but no latency of anything smaller.
        seconds
            After so long, the operators that are left (the quickest) are taken to shrink in proportion to their sizes.
        cache
            Folder that keeps times for later; True for :func:`cache_folder`, False for none.
        fresh
            Take all times again, in place of those that are kept.
        progress
            Called with ``(done, total, name)`` before each operator.
        """
        begin = time.perf_counter()
        tensors = [*model.parameters(), *model.buffers()]
        device = tensors[0].device if tensors else torch.device("cpu")
        folder = None if cache is False else cache_folder() if cache is True else Path(cache)
        known = Cache(folder, machine(device, threads), fresh)
        timer = Timer(Clock(device, threads), known, sum(t.numel() * t.element_size() for t in tensors))
        sizes = Sizes(graph)
        entries, calls = entries_of(record(graph, model, dummy_input, sizes))
        try:
            whole = timer.run(model, dummy_input, entries, calls)
            taken = known.taken
            timer.alone(entries, curves, begin + seconds, progress)
            if curves and known.taken > taken:
                whole = timer.run(model, dummy_input, entries, calls, again=True)
        finally:
            timer.clock.release()
            known.save()
        table = cls(graph, sizes, entries, calls, whole, timer, curves)
        table.seconds = time.perf_counter() - begin
        return table

    def latency_ms(self, kept: Mapping[str, int] | None = None) -> float:
        """Return the latency where the named groups keep so many units each, and the others all.

        Parameters
        ----------
        kept
            Kept units by group name, as :meth:`ChannelGraph.cost` takes it and ``Plan.counts`` gives it.
        """
        return self.total_ms(self.graph.cost_model.counts(kept))

    def total_ms(self, counts: Array) -> float:
        """Return the latency where group ``i`` of the graph keeps ``counts[i]`` units: the fast form for searches."""
        return float(self._counts @ self._times(counts)) + self.overhead_ms

    def modules(self, kept: Mapping[str, int] | None = None) -> dict[str, float]:
        """Return the milliseconds of the operators that each module's forward calls: with ``overhead_ms`` the total."""
        times = self._times(self.graph.cost_model.counts(kept))
        found: dict[str, float] = {}
        for module, entry, _ in self._calls:
            found[module] = found.get(module, 0.0) + float(times[entry])
        return found

    def group_ms(self, group: ChannelGroup | str) -> float:
        """Return the milliseconds of the operators that a group's units go through, at full size.

        An operator between two groups is in both.
        """
        found = self.graph.group(group) if isinstance(group, str) else group
        place = next(index for index, one in enumerate(self.graph.groups) if one is found)
        return float(sum(self._full_ms[call.entry] for call in self._calls if place in call.groups))

    @property
    def has_curves(self) -> bool:
        """Whether the latency of a smaller model is known, and not only shares of this one's."""
        return self._has_curves

    def timed_ms(self, kept: Mapping[str, int] | None = None) -> float:
        """Return the latency with each operator timed at its very sizes in the compact model, not interpolated.

        Slower than :meth:`latency_ms`, since sizes that are not known yet are timed (and kept); for checking what a
        search has found.
        """
        rows = self._rows @ self.graph.cost_model.counts(kept) + self._row_constants
        params = self.graph.cost().params
        left = self.graph.cost(kept).params / params if params else 1.0
        total = self.overhead_ms
        try:
            for entry, full_ms in zip(self._entries, self._full_ms, strict=True):
                total += float(full_ms) * entry.count * self._timed(entry, rows, left)
        finally:
            self._timer.clock.release()
            self._timer.cache.save()
        return total

    def _timed(self, entry: Entry, rows: Array, left: float) -> float:
        fractions = {row: float(rows[row]) for row in entry.rows}
        if all(fraction == 1.0 for fraction in fractions.values()):
            return 1.0
        (full,) = self._timer.times(entry, [{}])
        (found,) = self._timer.times(entry, [fractions], left)
        return found / full if full and found else math.prod(fractions.values())

    def _times(self, counts: Array) -> Array:
        if self._has_curves:
            times = self._full_ms.copy()
            times[self._moving] *= self._curves.shares((self._matrix @ counts + self._constants).reshape(2, -1))
            return times
        if not np.array_equal(counts, self._all):
            raise ValueError(
                "this latency table was measured with curves=False and knows shares only; measure it with curves=True "
                "for the latency of a smaller model"
            )
        return self._full_ms

    def _pack(self, entries: list[Entry]) -> None:
        """Make the matrix from kept counts to fractions: of each entry along its first axis, then along its second."""
        weights = [np.zeros((len(entries), self._rows.shape[0])) for _ in range(2)]
        constants = np.ones((2, len(entries)))
        for index, entry in enumerate(entries):
            for place in range(len(entry.axes)):
                for row, weight in entry.weights(place).items():
                    weights[place][index, row] = weight
                    constants[place, index] -= weight
        self._matrix = csr_matrix(vstack([csr_matrix(w) @ self._rows for w in weights]))
        self._constants = constants.ravel() + np.concatenate([w @ self._row_constants for w in weights])


def _shared_out(entries: list[Entry], whole: float, counts: Array, most: float) -> tuple[float, Array]:
    """Return what of a run's time is overhead, at ``most``, and what each entry takes.

    An operator takes what it takes alone. Where that does not make up the run, the caches are to blame (weights that
    come from memory), and each gets a part of what it took longer while it was timed within the run.
    """
    within = np.array([entry.within_ms for entry in entries])
    alone = np.array([entry.within_ms if entry.alone_ms is None else entry.alone_ms for entry in entries])
    missing = whole - float(counts @ alone)
    overhead = min(max(0.0, missing), most)
    longer = np.maximum(within - alone, 0.0)
    total = float(counts @ longer)
    if missing > overhead and total:
        alone = alone + longer * min(1.0, (missing - overhead) / total)
    sum_ms = float(counts @ alone)
    return overhead, alone * ((whole - overhead) / sum_ms) if sum_ms else alone

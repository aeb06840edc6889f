"""Which batch norm scales what a layer reads: found on the watched run, for pruners that use its scale.

Ye et al. (Rethinking the Smaller-Norm-Less-Informative Assumption, ICLR 2018) and Lin et al. (Synaptic Strength,
NeurIPS 2018) move a norm's scale γ into the layers that read it. That changes nothing where all between them commutes
with positive factors (ReLU, pooling), where γ > 0 and β goes to β/γ, and where nobody else reads the norm.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from nni_plugins.channels import ChannelGraph
    from nni_plugins.channels.call import Info, Operator

_MOVES = frozenset(
    "view _unsafe_view reshape flatten permute transpose t clone contiguous alias detach unsqueeze squeeze expand "
    "slice select split split_with_sizes chunk unbind narrow cat concat pixel_shuffle channel_shuffle _to_copy "
    "dropout native_dropout lift_fresh".split()
)
_STILL = frozenset("contiguous clone alias detach dropout native_dropout _to_copy lift_fresh".split())
_POOLS = frozenset(
    "mean max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
    "avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest2d "
    "upsample_bilinear2d".split()
)
_SCALING = _MOVES | _POOLS | frozenset("relu relu_ leaky_relu leaky_relu_ prelu _prelu_kernel".split())
"""Operators f with f(c·x) = c·f(x) for c > 0, channel by channel."""
_BENDING = frozenset("hardtanh hardtanh_ hardswish hardswish_ silu silu_ gelu elu elu_ mish tanh".split())
"""Operators of one input that keep zero zero and a large scale large, but do not commute with it."""


@dataclass(frozen=True)
class Reading:
    """What one layer reads.

    Attributes
    ----------
    norms : tuple of (str, numpy.ndarray)
        A norm's module, and for each input index of the layer the index of its channel in that norm, or −1. Empty
        where some of the layer's input comes from elsewhere, or sums up several results.
    normalised : str
        The batch norm that alone reads what the layer gives, so that the scale of each of its rows is of no effect; ''
        where there is none.
    """

    norms: tuple[tuple[str, np.ndarray], ...]
    normalised: str


def _short(operator: Operator) -> str:
    return operator.name.rpartition(".")[2]


def _norm_weight(operator: Operator) -> Info | None:
    """The scale of a batch norm's call, or None where it is none, or has no scale."""
    if "batch_norm" not in operator.name:
        return None
    own = f"{operator.module}.weight" if operator.module else "weight"  # without one, its statistics come first
    return next((info for info in operator.inputs[1:2] if info.parameter == own), None)


class Producers:
    """The norms and layers of a watched run.

    Parameters
    ----------
    graph : ChannelGraph
        Of the model.
    layers : collection of str
        Full names of the weights that are of interest.
    """

    def __init__(self, graph: ChannelGraph, layers: Collection[str]):
        self.graph = graph
        self._made = {id(info): op for op in graph.trace.operators for info in op.outputs}
        self._read: dict[int, list[Operator]] = {}
        for op in graph.trace.operators:
            for info in op.inputs:
                self._read.setdefault(id(info), []).append(op)
        self._calls: dict[str, list[Operator]] = {name: [] for name in layers}
        for op in graph.trace.operators:
            for name in self._weights(op):
                if name in self._calls:
                    self._calls[name].append(op)
        self.readings = {name: self._reading(calls) for name, calls in self._calls.items()}

    def _weights(self, op: Operator) -> set[str]:
        """The parameter that an operator contracts with: as it is, or transposed."""
        found = set()
        for contraction in op.contractions:
            right = contraction.right
            if right is not None:
                maker = self._made.get(id(right))
                right = maker.inputs[0] if maker is not None and _short(maker) in ("t", "transpose") else right
                found.add(right.parameter)
        return found - {""}

    def _reading(self, calls: list[Operator]) -> Reading:
        after = {self._norm_after(op) for op in calls}
        normalised = after.pop() if len(after) == 1 else ""
        if len(calls) != 1 or len(calls[0].contractions) != 1:
            return Reading((), normalised)  # a shared layer reads several things
        contraction = calls[0].contractions[0]
        labels = contraction.left.labels[contraction.left_dim]
        found: dict[str, tuple[Info, bool]] = {}
        if labels is None or not self._sources(contraction.left, found, False):
            return Reading((), normalised)
        classes = self.graph.solution.classes
        norms = []
        for module, (scale, moved) in found.items():
            if scale.labels[0] is None:
                return Reading((), normalised)
            own, read = classes[scale.labels[0]], classes[labels]
            channel = {klass: i for i, klass in enumerate(own.tolist())}
            if len(channel) == len(own):
                norms.append((module, np.array([channel.get(klass, -1) for klass in read.tolist()])))
            elif not moved and len(own) == len(read):
                norms.append((module, np.arange(len(own))))
            else:  # tied channels (of a grouped convolution), and moved: which is which cannot be told
                return Reading((), normalised)
        covered = np.sum([places >= 0 for _, places in norms], axis=0)
        return Reading(tuple(norms) if (covered == 1).all() else (), normalised)

    def _norm_after(self, op: Operator) -> str:
        readers = self._read.get(id(op.outputs[0]), [])
        return readers[0].module if len(readers) == 1 and "batch_norm" in readers[0].name else ""

    def _sources(self, info: Info, found: dict[str, tuple[Info, bool]], moved: bool) -> bool:
        """Collect the norms that a tensor comes from, channel by channel; False where there is something else."""
        op = self._made.get(id(info))
        if op is None:
            return False
        scale = _norm_weight(op)
        if scale is not None:
            found[op.module] = scale, moved
            return True
        name = _short(op)
        data = [i for i in op.inputs if i.dynamic]
        if name not in _SCALING | _BENDING or not data:
            return False
        moved = moved or (name in _MOVES and name not in _STILL)
        return all(self._sources(i, found, moved) for i in data)

    def foldable(self) -> list[str]:
        """Norms that only layers of interest read, with nothing between that does not commute with a factor."""
        outputs = {id(info) for info in self.graph.trace.outputs}
        names = []
        for op in self.graph.trace.operators:
            if _norm_weight(op) is not None and self._ends_in_layers(op.outputs[0], op.module, outputs):
                names.append(op.module)
        calls = [op.module for op in self.graph.trace.operators if _norm_weight(op) is not None]
        return [name for name in names if calls.count(name) == 1]

    def _ends_in_layers(self, info: Info, norm: str, outputs: set[int]) -> bool:
        readers = self._read.get(id(info), [])
        if id(info) in outputs or not readers:
            return False
        for op in readers:
            if op.contractions:
                weights = self._weights(op)
                known = all(
                    name in self.readings and norm in dict(self.readings[name].norms) for name in weights
                )  # fmt: skip
                if not weights or not known or op.contractions[0].left is not info:
                    return False
            elif _short(op) not in _SCALING or not self._ends_in_layers(op.outputs[0], norm, outputs):
                return False
        return True

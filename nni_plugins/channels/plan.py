"""The plan: which units of each group are kept. Every mask, slice, width and export is read from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from nni_plugins.channels.blocks import removal_of
from nni_plugins.channels.cost import Cost
from nni_plugins.channels.graph import ChannelGraph
from nni_plugins.channels.labels import Array


class Plan:
    """Which units of each group are kept, and which blocks are removed.

    Parameters
    ----------
    graph
        The channel graph that the names belong to.
    kept
        Per group name, a bool array of shape ``[group.size]`` or the indices of the kept units. A group that is not
        named keeps all its units.
    blocks
        Names of blocks that are removed. What is inside another one that is named goes with it.

    Attributes
    ----------
    removal
        Which modules, operators and parameters go with the blocks.

    Raises
    ------
    KeyError
        If no group, or no block, has such a name.
    ValueError
        If a group that is not prunable would lose units, a group would be left empty, an array does not fit, or a block
        cannot be removed, or not beside the others.
    """

    def __init__(self, graph: ChannelGraph, kept: Mapping[str, Any], blocks: Sequence[str] = ()) -> None:
        self.graph = graph
        self.blocks = tuple(name for name in dict.fromkeys(blocks) if not _within(name, blocks))
        self.removal = removal_of(graph, self.blocks)
        self.kept: dict[str, Array] = {}
        for name, value in kept.items():
            group = graph.group(name)
            units = _as_indices(name, value, group.size)
            if len(units) == group.size:
                continue
            if not group.prunable:
                raise ValueError(f"group {name!r} cannot lose units: {group.reason}")
            if not len(units):
                raise ValueError(f"group {name!r} would lose all its {group.size} units; keep at least one")
            self.kept[name] = units
        self._keep = np.ones(len(graph.solution), dtype=bool)
        for name, units in self.kept.items():
            classes = graph.group(name).classes
            self._keep[classes] = False
            self._keep[classes[units]] = True
        self._slices: dict[str, dict[int, Array]] | None = None

    def __repr__(self) -> str:
        lost = ", ".join(f"{name}: {len(u)}/{self.graph.group(name).size}" for name, u in self.kept.items())
        return f"Plan({', '.join(filter(None, [lost, *(f'without {name}' for name in self.blocks)]))})"

    @property
    def counts(self) -> dict[str, int]:
        """How many units each group that loses some keeps."""
        return {name: len(units) for name, units in self.kept.items()}

    @property
    def exact(self) -> bool:
        """Whether what goes is the same as masked."""
        groups = all(self.graph.group(name).exact for name in self.kept)
        return groups and all(self.graph.block(name).exact for name in self.blocks)

    def keeps(self, labels: Array) -> Array:
        """Return, as bool, which of ``labels`` are kept."""
        return self._keep[self.graph.solution.classes[labels]]

    def dimensions(self, name: str) -> dict[int, Array]:
        """Return the kept indices along each dimension of a parameter or buffer that loses some, but not all."""
        out: dict[int, Array] = {}
        if name in self.removal.parameters:
            return out
        for dim, labels in enumerate(self.graph.trace.parameters.get(name, [])):
            if labels is not None:
                keep = self.keeps(labels)
                if not keep.all():
                    out[dim] = np.flatnonzero(keep)
        return out

    def slices(self) -> dict[str, dict[int, Array]]:
        """Return ``{parameter or buffer: {dimension: kept indices}}`` for all that shrink and do not go."""
        if self._slices is None:
            found = {name: self.dimensions(name) for name in self.graph.trace.parameters}
            self._slices = {name: dims for name, dims in found.items() if dims}
        return self._slices

    def masked_slices(self) -> dict[str, dict[int, Array]]:
        """Return :meth:`slices` without the dimensions along which a mask would make 0/0 of a parameter (weight norm).

        There, what the parameter is multiplied by is masked for it.
        """
        fixed = self.graph.trace.unmasked
        found = {
            n: {dim: kept for dim, kept in dims.items() if (n, dim) not in fixed} for n, dims in self.slices().items()
        }
        return {name: dims for name, dims in found.items() if dims}

    def sizes(self) -> dict[tuple[str, str], dict[int, int]]:
        """Return ``{(module, attribute): {old value: new value}}`` for module attributes that count what goes."""
        out: dict[tuple[str, str], dict[int, int]] = {}
        for known in (self.graph.trace.sizes, self.graph.learnt):  # what was learnt on a replay counts more
            for key, candidates in known.items():
                if self.removal.holds(key[0]):
                    continue
                for labels in candidates:
                    keep = self.keeps(labels)
                    if not keep.all():
                        out.setdefault(key, {})[len(labels)] = int(keep.sum())
        return out

    def flexible(self) -> list[str]:
        """Return the names of modules whose forward must be exchanged, because they or their children shrink."""
        names = self.graph.trace.flexible
        if not names:
            return []
        smaller = [*self.slices(), *self.removal.modules]
        return [
            name
            for name in names
            if not self.removal.holds(name) and any(part.startswith(f"{name}." if name else "") for part in smaller)
        ]

    def stand_ins(self) -> dict[str, Any]:
        """Return, for each module that goes, what stands in for it: see :mod:`nni_plugins.channels.stand_in`."""
        return self.removal.stand_ins(lambda labels: int(self.keeps(labels).sum()))

    def masks(self, model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
        """Return the plan as NNI's masks: ``{module: {parameter: mask}}``, 1 where kept.

        Every parameter that a group reaches is masked along every dimension, producers, norms and consumers alike, so
        that the masked model computes what the compact one does; those of a block that goes are masked throughout.
        Masks have the parameter's shape, dtype and device.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        masks: dict[str, dict[str, torch.Tensor]] = {}
        for name, dims in self.masked_slices().items():
            if self.graph.is_buffer[name]:
                continue
            for alias in (name, *self.graph.aliases.get(name, [])):
                module, _, parameter = alias.rpartition(".")
                masks.setdefault(module, {})[parameter] = mask_of(parameters[alias], dims)
        for name in sorted(self.removal.parameters):
            for alias in (name, *self.graph.aliases.get(name, [])) if not self.graph.is_buffer[name] else ():
                module, _, parameter = alias.rpartition(".")
                masks.setdefault(module, {})[parameter] = torch.zeros_like(parameters[alias], requires_grad=False)
        return masks

    def cost(self) -> Cost:
        """Return the cost of the compact model."""
        return self.graph.cost_model.exact_cost(self._keep, self.removal)

    def to_dict(self) -> dict[str, Any]:
        """Return ``{group: {'size', 'kept'}}``, plain numbers, for groups that lose units; a block is one unit."""
        blocks: dict[str, Any] = {f"block {name}": {"size": 1, "kept": []} for name in self.blocks}
        return blocks | {
            name: {"size": self.graph.group(name).size, "kept": units.tolist()} for name, units in self.kept.items()
        }


def _within(name: str, others: Sequence[str]) -> bool:
    """Whether a module is below one of ``others``."""
    return any(name.startswith(f"{other}.") for other in others)


def mask_of(parameter: torch.Tensor, dims: Mapping[int, Array]) -> torch.Tensor:
    """Return a mask of ones with zeros wherever an index along one of ``dims`` is not among the kept ones."""
    mask = torch.ones_like(parameter, requires_grad=False)
    for dim, indices in dims.items():
        gone = np.setdiff1d(np.arange(parameter.shape[dim]), indices)
        mask.index_fill_(dim, torch.as_tensor(gone, device=mask.device), 0)
    return mask


def _as_indices(name: str, value: Any, size: int) -> Array:
    array = np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)
    if array.dtype == bool:
        if array.shape != (size,):
            raise ValueError(f"group {name!r} has {size} units; the mask has shape {array.shape}")
        return np.flatnonzero(array)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"group {name!r}: kept units are given as bool or integers, not as {array.dtype}")
    units = np.unique(array.astype(np.int64))
    if len(units) and (units[0] < 0 or units[-1] >= size):
        raise ValueError(
            f"group {name!r} has {size} units; unit {units[-1] if units[-1] >= size else units[0]} is none"
        )
    return units

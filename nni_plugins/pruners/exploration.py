"""Exploration: which single weights of the channels that are left are active, and how that changes while training.

The unstructured half of :class:`~nni_plugins.pruners.hybrid.HybridPruner`, on plain tensors. Each layer keeps its
share of a density (Erdős–Rényi kernel) within what is alive of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nni_plugins.pruners.densities import kept_counts, layer_densities
from nni_plugins.pruners.patterns import Pattern
from nni_plugins.pruners.regrow import drop_and_grow, top

Dims = Mapping[int, Tensor]
"""Indices that are alive, by dimension; all along a dimension that is not named."""


def region(weight: Tensor, alive: Dims) -> Tensor:
    """What is alive of a weight: bool, of its shape."""
    inside = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    for dim, kept in alive.items():
        along = torch.zeros(weight.shape[dim], dtype=torch.bool, device=weight.device)
        along[kept.to(weight.device)] = True
        inside &= along.view([-1 if d == dim else 1 for d in range(weight.dim())])
    return inside


def shares(weights: Mapping[str, Tensor], alive: Mapping[str, Dims], density: float) -> dict[str, int]:
    """How many weights each layer keeps of a density that counts what is alive."""
    shapes = {
        name: [len(alive[name][dim]) if dim in alive[name] else size for dim, size in enumerate(weight.shape)]
        for name, weight in weights.items()
    }
    return kept_counts(shapes, layer_densities(shapes, min(density, 1.0), "erk"))


def fitted(weight: Tensor, mask: Tensor, count: int, inside: Tensor, gradient: Tensor | None = None) -> Tensor:
    """A mask with ``count`` weights inside: the smallest are dropped, or those of largest gradient grow.

    Without a gradient the largest grow.

    Returns
    -------
    torch.Tensor
        Bool.
    """
    active = ((mask != 0) & inside).flatten()
    missing = count - int(active.sum())
    if missing < 0:
        active[active.clone()] = top(weight.detach().abs().flatten()[active].float(), count)
    elif missing > 0:
        free = inside.flatten() & ~active
        score = (weight if gradient is None else gradient).detach().abs().flatten().float()
        active[free] = top(score[free], missing)
    return active.view(weight.shape)


def exchanged(weight: Tensor, mask: Tensor, gradient: Tensor, count: int, inside: Tensor, fraction: float) -> Tensor:
    """A mask with ``count`` weights inside, of which ``fraction`` was dropped for others: bool."""
    now = fitted(weight, mask, count, inside, gradient)
    return drop_and_grow(weight * now, now, gradient, fraction, allowed=inside) != 0


def patterned(
    weight: Tensor, mask: Tensor, count: int, alive: Dims, pattern: Pattern, layout: tuple[int, int]
) -> Tensor:
    """A mask of at most ``count`` weights that has an N:M pattern in the weight as it is without what is dead: bool."""
    small, active = weight.detach().abs().float(), mask != 0
    for dim, kept in alive.items():
        small, active = (t.index_select(dim, kept.to(t.device)) for t in (small, active))
    groups = layout[1] if small.shape[layout[0]] % layout[1] == 0 else 1
    found = pattern.mask(torch.where(active, small, small - small.amax() - 1), layout[0], groups)
    found = fitted(small, found, min(count, int(found.sum())), torch.ones_like(found))
    out = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    index = torch.meshgrid(
        *[
            alive[d].to(weight.device) if d in alive else torch.arange(size, device=weight.device)
            for d, size in enumerate(weight.shape)
        ],
        indexing="ij",
    )
    out[index] = found
    return out

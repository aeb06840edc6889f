"""Exploration: which single weights of the channels that are left are active, and how that changes while training.

The unstructured half of :class:`~nni_plugins.pruners.hybrid.HybridPruner`, on plain tensors. Each layer keeps its
share of a density (Erdős–Rényi kernel) within what is alive of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nni_plugins.pruners.densities import kept_counts, layer_densities
from nni_plugins.pruners.errors import PruningError
from nni_plugins.pruners.patterns import Pattern
from nni_plugins.pruners.regrow import drop_and_grow, drop_fraction, top

Dims = Mapping[int, Tensor]
"""Indices that are alive, by dimension; all along a dimension that is not named."""
PAID_BACK = (0.8, 0.95)
"""From when to when, as fractions of training, the weights above the budget go."""


@dataclass(frozen=True)
class Layer:
    """A layer as it is now.

    Parameters
    ----------
    weight : torch.Tensor
        Its weight.
    mask : torch.Tensor or None
        Of the weight's shape, 1 where active.
    alive : mapping of int to torch.Tensor
        What of it belongs to channels that are left.
    layout : (int, int)
        The input dimension and its groups, from :func:`~nni_plugins.pruners.patterns.input_layout`.
    """

    weight: Tensor
    mask: Tensor | None
    alive: Dims
    layout: tuple[int, int]

    @property
    def active(self) -> Tensor:
        """The mask, also where there is none."""
        return torch.ones_like(self.weight) if self.mask is None else self.mask


@dataclass(frozen=True)
class Exploration:
    """How many weights are active, and how many of them are exchanged, over a training.

    Parameters
    ----------
    density : float
        Fraction that is active at the end, of the weights of channels that are left.
    over_density : float
        How much above that while exploring.
    pattern : Pattern or None
        What the weights have in the end.
    alpha : float
        Fraction of the active weights that is exchanged at first; it falls along a cosine.
    end_fraction : float
        Fraction of training after which no weights are exchanged.
    lasting : float
        Fraction that is exchanged even after that.
    """

    density: float
    over_density: float
    pattern: Pattern | None
    alpha: float
    end_fraction: float
    lasting: float

    def __post_init__(self) -> None:
        if self.pattern is not None and self.lasting:
            raise PruningError(
                f"lasting exchanges weights after the end, and pattern {self.pattern} is made at the end"
            )

    def density_at(self, step: int, total: int) -> float:
        """Fraction of the weights that is active after a step."""
        first, last = (fraction * total for fraction in PAID_BACK)
        left = min(1.0, max(0.0, (last - step) / max(last - first, 1e-9)))
        return min(1.0, self.density + self.over_density * left)

    def exchanged_at(self, step: int, total: int) -> float:
        """Fraction of the active weights that is exchanged after a step; 0 where all weights are active."""
        if self.density_at(step, total) >= 1:
            return 0.0
        return max(drop_fraction(step, max(1, int(self.end_fraction * total)), self.alpha), self.lasting)

    def masks(
        self,
        layers: Mapping[str, Layer],
        gradients: Mapping[str, Tensor] | None,
        step: int,
        total: int,
        *,
        settled: bool = False,
    ) -> dict[str, Tensor]:
        """The layers' next masks.

        Parameters
        ----------
        layers : mapping of str to Layer
            By name.
        gradients : mapping of str to torch.Tensor or None
            Dense ones; a layer that has none exchanges nothing. None where no layer does.
        step, total : int
            Where in training.
        settled : bool
            Make the pattern, if there is one.

        Returns
        -------
        dict of str to torch.Tensor
            Bool; empty where all weights are active.
        """
        density = self.density_at(step, total)
        if density >= 1 and self.pattern is None:
            return {}
        counts, found = shares(layers, density), {}
        for name, layer in layers.items():
            if settled and self.pattern is not None:
                found[name] = patterned(layer, counts[name], self.pattern)
            elif gradients is None or name not in gradients:
                found[name] = fitted(layer.weight, layer.active, counts[name], region(layer.weight, layer.alive))
            else:
                fraction = self.exchanged_at(step, total)
                found[name] = exchanged(layer, gradients[name], counts[name], fraction)
        return found


def region(weight: Tensor, alive: Dims) -> Tensor:
    """What is alive of a weight: bool, of its shape."""
    inside = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    for dim, kept in alive.items():
        along = torch.zeros(weight.shape[dim], dtype=torch.bool, device=weight.device)
        along[kept.to(weight.device)] = True
        inside &= along.view([-1 if d == dim else 1 for d in range(weight.dim())])
    return inside


def shares(layers: Mapping[str, Layer], density: float) -> dict[str, int]:
    """How many weights each layer keeps of a density that counts what is alive."""
    shapes = {
        name: [len(layer.alive[dim]) if dim in layer.alive else size for dim, size in enumerate(layer.weight.shape)]
        for name, layer in layers.items()
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


def exchanged(layer: Layer, gradient: Tensor, count: int, fraction: float) -> Tensor:
    """A mask with ``count`` weights alive, of which ``fraction`` was dropped for others: bool."""
    inside = region(layer.weight, layer.alive)
    now = fitted(layer.weight, layer.active, count, inside, gradient)
    return drop_and_grow(layer.weight * now, now, gradient, fraction, allowed=inside) != 0


def patterned(layer: Layer, count: int, pattern: Pattern) -> Tensor:
    """A mask of at most ``count`` weights that has an N:M pattern in the weight as it is without what is dead: bool."""
    weight, device = layer.weight, layer.weight.device
    kept = [
        layer.alive[dim].to(device) if dim in layer.alive else torch.arange(size, device=device)
        for dim, size in enumerate(weight.shape)
    ]
    index = torch.meshgrid(*kept, indexing="ij")
    small, active = weight.detach().abs().float()[index], layer.active[index] != 0
    dim, groups = layer.layout
    groups = groups if small.shape[dim] % groups == 0 else 1
    found = pattern.mask(torch.where(active, small, small - small.amax() - 1), dim, groups)
    out = torch.zeros(weight.shape, dtype=torch.bool, device=device)
    out[index] = fitted(small, found, min(count, int(found.sum())), torch.ones_like(found))
    return out

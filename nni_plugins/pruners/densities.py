"""How a global density is shared out between layers, before any score is known.

``uniform`` gives every layer the same, ``erk`` more to layers with few weights for the size of their sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

Shapes = Mapping[str, Sequence[int]]
Bounds = Mapping[str, tuple[float, float]]


def _uniform(shape: Sequence[int]) -> float:
    return 1.0


def _erk(shape: Sequence[int]) -> float:
    return sum(shape) / max(float(np.prod(shape, dtype=np.float64)), 1.0)


DENSITIES: dict[str, Callable[[Sequence[int]], float]] = {"uniform": _uniform, "erk": _erk}
"""What the density of a layer is proportional to, by the name of the distribution."""


def layer_densities(shapes: Shapes, density: float, how: str = "erk", bounds: Bounds | None = None) -> dict[str, float]:
    """Densities of layers, of which none is above its bounds and that meet a global density together.

    ``density_l = ε·raw_l``, with ``raw_l = Σ(shape_l)/Π(shape_l)`` for ``erk`` (Erdős–Rényi kernel: Evci et al.,
    Rigging the Lottery, ICML 2020; Mocanu et al., Nature Communications 2018); layers that would exceed 1 are
    dense, and ε is solved again for the others.

    Parameters
    ----------
    shapes : mapping of str to sequence of int
        Of each layer's weight.
    density : float
        Fraction of all weights that is kept, in [0, 1].
    how : {'erk', 'uniform'}
        The distribution.
    bounds : mapping of str to (float, float), optional
        Least and greatest density of a layer; (0, 1) where none is given.

    Returns
    -------
    dict of str to float
        By layer. Where the bounds do not admit the density, as near to it as they do.
    """
    names = list(shapes)
    if not names:
        return {}
    sizes = np.array([np.prod(shapes[name], dtype=np.float64) for name in names])
    raw = np.array([max(DENSITIES[how](shapes[name]), 1e-30) for name in names])
    given = [(bounds or {}).get(name, (0.0, 1.0)) for name in names]
    low, high = np.array([pair[0] for pair in given]), np.array([pair[1] for pair in given])
    # the total is piecewise linear in ε, with a bend where a layer reaches one of its bounds
    bends = np.unique(np.concatenate([[0.0], low / raw, high / raw]))
    totals = (np.clip(bends[:, None] * raw, low, high) * sizes).sum(axis=1)
    rising = np.concatenate([[True], np.diff(totals) > 0])
    epsilon = np.interp(density * sizes.sum(), totals[rising], bends[rising])
    return dict(zip(names, np.clip(epsilon * raw, low, high).tolist(), strict=True))


def kept_counts(shapes: Shapes, densities: Mapping[str, float], *, joint: bool = True) -> dict[str, int]:
    """Whole numbers of weights to keep, at least 1 in each layer.

    Parameters
    ----------
    shapes : mapping of str to sequence of int
        Of each layer's weight.
    densities : mapping of str to float
        Fraction that each layer keeps.
    joint : bool
        Round so that the total is right (largest remainders); otherwise each layer by itself.
    """
    sizes = {name: int(np.prod(shapes[name], dtype=np.int64)) for name in shapes}
    exact = {name: densities[name] * sizes[name] for name in sizes}
    if joint:
        counts = {name: int(np.floor(value + 1e-9)) for name, value in exact.items()}
        missing = round(sum(exact.values())) - sum(counts.values())
        for name in sorted(exact, key=lambda n: counts[n] - exact[n])[: max(missing, 0)]:
            counts[name] += 1
    else:
        counts = {name: round(value) for name, value in exact.items()}
    return {name: min(max(count, 1), sizes[name]) for name, count in counts.items()}

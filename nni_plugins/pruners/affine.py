"""Learnt corrections of scores: what makes the units of different groups comparable can be searched for.

Chin et al., "Towards Efficient Model Compression via Learned Global Ranking" (LeGR), CVPR 2020: the score of a unit is
a·s + b, with a and b of its layer's own, and one ranking over all layers decides. Here s is the method's comparable
score, and b counts in means of it, so that the same numbers mean the same for every method and model.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence

import numpy as np

from nni_plugins.pruners.errors import PruningError

Affine = Mapping[str, tuple[float, float]]


def affine_by_group(affine: Affine, groups: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return a and b of each group that a prefix names; the longest prefix counts.

    Parameters
    ----------
    affine : mapping of str to (float, float)
        By the beginning of a group's name (``layer1`` for ``layer1.0.conv1``) or the name itself.
    groups : sequence of str
        Names of the groups to prune.

    Raises
    ------
    PruningError
        A prefix that no group begins with, or a number that is not finite.
    """
    used, found = set(), {}
    for prefix, pair in affine.items():
        if len(tuple(pair)) != 2 or not all(isinstance(n, (int, float)) and math.isfinite(n) for n in pair):
            raise PruningError(f"affine of {prefix} is {pair!r}; it must be two finite numbers, a factor and a shift")
    for name in groups:
        matching = [prefix for prefix in affine if begins(name, prefix)]
        used.update(matching)
        if matching:
            factor, shift = affine[max(matching, key=len)]
            found[name] = float(factor), float(shift)
    unknown = [prefix for prefix in affine if prefix not in used]
    if unknown:
        near = difflib.get_close_matches(unknown[0], groups, 3, 0.5) or list(groups)[:6]
        raise PruningError(f"affine: no group to prune begins with {unknown[0]!r}; closest: {', '.join(near)}")
    return found


def begins(name: str, prefix: str) -> bool:
    """Whether a group's name is a prefix, or lies below it: ``layer1`` for ``layer1.0.conv1``, not ``layer10``."""
    plain = name.partition(":")[0]
    return name == prefix or plain == prefix or plain.startswith(prefix + ".")


def transformed(
    scores: Mapping[str, np.ndarray], dead: Mapping[str, np.ndarray], affine: Affine
) -> dict[str, np.ndarray]:
    """Return a·s + b·m of each group that has an a and a b, m being the mean score of all live units.

    Parameters
    ----------
    scores : mapping of str to numpy.ndarray
        Comparable scores, float [size] by group name.
    dead : mapping of str to numpy.ndarray
        Bool [size]: units that do not count in the mean.
    affine : mapping of str to (float, float)
        By group name.
    """
    if not affine:
        return dict(scores)
    live = [values[~dead[name]] if name in dead else values for name, values in scores.items()]
    mean = float(np.concatenate(live).mean()) if live else 0.0
    result = dict(scores)
    for name, (factor, shift) in affine.items():
        if name in result:
            result[name] = factor * np.asarray(result[name], dtype=np.float64) + shift * mean
    return result

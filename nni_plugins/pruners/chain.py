"""The order in which the units of a pool go: one line of events, from nothing removed to all that may be.

A state of a pool is how many units each of its groups has lost. The *chain* is a sequence of states, each
of which removes a few units (one *event*) more than the one before, so that any cost falls along it and a
budget is found by bisection. What a scope means is only the order of the events:

- ``global``: by score, across groups
- ``local``: by the fraction of its group that an event completes, so that every group loses the same fraction
- ``isomorphic``: by the fraction of its class that an event completes, by score within a class
- ``knapsack``: as ``global``; which state is taken is found otherwise (:mod:`~nni_plugins.pruners.knapsack`)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SCOPES = ("local", "global", "isomorphic", "knapsack")
NORMALISATIONS = ("mean", "l2", "max", None)


@dataclass(frozen=True)
class GroupRanking:
    """What the chain must know of one group.

    Parameters
    ----------
    name : str
        Name of the channel group.
    scores : numpy.ndarray
        Float [size]: importance of each unit; the smallest go first.
    dead : numpy.ndarray
        Bool [size]: units that are gone already; they stay gone.
    lower, upper : float
        Least and greatest fraction of the units that may be removed.
    multiple : int
        The number of units kept is a multiple of this (or all of them).
    signature : object
        Class of the group for the isomorphic scope.
    """

    name: str
    scores: np.ndarray
    dead: np.ndarray
    lower: float = 0.0
    upper: float = 1.0
    multiple: int = 1
    signature: object = None

    def removal_order(self) -> np.ndarray:
        """Int [size]: units in the order in which they go: the dead ones, then by score, then by index."""
        return np.lexsort((self.scores, ~self.dead))

    def counts(self) -> np.ndarray:
        """Int [events + 1]: the numbers of removed units that are allowed, ascending; the first is the start."""
        size, dead = len(self.scores), int(self.dead.sum())
        most = min(int(np.floor(self.upper * size + 1e-9)), size - 1)
        least = max(int(np.ceil(self.lower * size - 1e-9)), dead)
        kept = np.arange(self.multiple, size + 1, self.multiple)
        removed = (size - kept)[::-1]
        allowed = removed[(removed >= least) & (removed <= most)]
        if least == dead or len(allowed) == 0:
            return np.concatenate([[dead], allowed[allowed > dead]])
        return allowed


class Events(NamedTuple):
    """Events in chain order: ``group`` [n] is the index of the group, ``key`` [n] what they were sorted by."""

    group: np.ndarray
    key: np.ndarray


class Chain:
    """States of a pool from the least to the most that may be removed.

    Parameters
    ----------
    rankings : sequence of GroupRanking
        The groups of the pool.
    scope : {'local', 'global', 'isomorphic'}
        What orders the events.
    """

    def __init__(self, rankings: Sequence[GroupRanking], scope: str):
        if scope not in SCOPES:
            raise ValueError(f"scope is {scope!r}; it must be one of {', '.join(SCOPES)}")
        self.rankings = list(rankings)
        self.orders = [ranking.removal_order() for ranking in self.rankings]
        self.counts = [ranking.counts() for ranking in self.rankings]
        self.events = self._sorted_events(scope)
        self.positions = [np.flatnonzero(self.events.group == index) for index in range(len(self.rankings))]

    def __len__(self) -> int:
        return len(self.events.group)

    def _sorted_events(self, scope: str) -> Events:
        groups, steps, means, middles = [], [], [], []
        for index, (ranking, order, counts) in enumerate(zip(self.rankings, self.orders, self.counts, strict=True)):
            events = len(counts) - 1
            sums = np.concatenate([[0.0], np.cumsum(ranking.scores[order], dtype=np.float64)])
            widths = np.diff(counts)
            groups.append(np.full(events, index))
            steps.append(widths)
            means.append(np.diff(sums[counts]) / np.maximum(widths, 1))
            middles.append((counts[1:] + counts[:-1]) / (2.0 * len(order)))
        group, width = np.concatenate([[], *groups]).astype(np.int64), np.concatenate([[], *steps])
        # rounding must not disturb the order within a group
        mean = np.concatenate([[], *(np.maximum.accumulate(values) for values in means if len(values))])
        if scope == "local":
            key = np.concatenate([[], *middles])
        elif scope in ("global", "knapsack"):
            key = mean
        else:
            key = self._class_fractions(group, width, mean)
        by_key = np.argsort(key, kind="stable")
        return Events(group[by_key], key[by_key])

    def _class_fractions(self, group: np.ndarray, width: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Key of the isomorphic scope: the middle of each event in its class, as a fraction of the class."""
        classes: dict[object, int] = {}
        of_group = np.array([classes.setdefault(r.signature, len(classes)) for r in self.rankings], dtype=np.int64)
        key = np.zeros(len(group))
        for number in range(len(classes)):
            members = np.flatnonzero(of_group == number)
            units = sum(len(self.orders[index]) for index in members)
            start = sum(int(self.counts[index][0]) for index in members)
            here = np.flatnonzero(np.isin(group, members))
            ranked = here[np.argsort(mean[here], kind="stable")]
            key[ranked] = (start + np.cumsum(width[ranked]) - width[ranked] / 2) / units
        return key

    def state(self, position: int) -> np.ndarray:
        """Int [groups]: the number of events of each group among the first ``position``."""
        return np.bincount(self.events.group[:position], minlength=len(self.rankings))

    def removed(self, state: np.ndarray) -> dict[str, int]:
        """Number of removed units by group name."""
        return {
            ranking.name: int(counts[done])
            for ranking, counts, done in zip(self.rankings, self.counts, state, strict=True)
        }

    def keep_masks(self, state: np.ndarray) -> dict[str, np.ndarray]:
        """Bool [size] by group name: True for the units kept in ``state``."""
        masks = {}
        for ranking, order, counts, done in zip(self.rankings, self.orders, self.counts, state, strict=True):
            mask = np.ones(len(order), dtype=bool)
            mask[order[: counts[done]]] = False
            masks[ranking.name] = mask
        return masks


def normalised(
    scores: Mapping[str, np.ndarray], dead: Mapping[str, np.ndarray], how: str | None
) -> dict[str, np.ndarray]:
    """Scores made comparable between groups.

    Parameters
    ----------
    scores : mapping of str to numpy.ndarray
        Float [size] by group name.
    dead : mapping of str to numpy.ndarray
        Bool [size]: units left out of the statistics.
    how : {'mean', 'l2', 'max', None}
        Divide by the mean of the group's live units (their scores then average 1), by their L2 norm, by
        the largest, or leave as is.

    Returns
    -------
    dict of str to numpy.ndarray
        Float64 [size] by group name.
    """
    result = {}
    for name, values in scores.items():
        values = np.asarray(values, dtype=np.float64)
        live = np.abs(values[~dead[name]]) if name in dead else np.abs(values)
        if how is None or len(live) == 0:
            scale = 1.0
        elif how == "mean":
            scale = float(live.mean())
        elif how == "l2":
            scale = float(np.linalg.norm(live))
        elif how == "max":
            scale = float(live.max())
        else:
            raise ValueError(f"normalise is {how!r}; it must be 'mean', 'l2', 'max', 'cost' or None")
        result[name] = values / scale if scale > 0 else values
    return result

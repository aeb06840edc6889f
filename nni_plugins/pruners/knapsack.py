"""The knapsack scope: of all states under the budget, the one that loses the least importance.

Shen et al., "Structural Pruning via Latency-Saliency Knapsack" (HALP), NeurIPS 2022: a unit's value is its importance,
its weight what it costs of the budget, and of a group the least important units go first. There the budget is a
latency from a table; here it is whatever the pool's target counts.

What a group saves depends on what the others have lost already (a convolution costs its inputs times its outputs), so
the cost is taken as a sum over groups only near a state, and the budget is lowered to the asked one in steps, as there
(30). In each step a knapsack with one choice for each group is solved exactly, up to the rounding of costs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nni_plugins.pruners.chain import Chain

STEPS = 30
"""In which the budget is lowered to the asked one (HALP, section 3.2)."""
_OPTIONS = 24  # of a group in one step, its present state among them
_BINS = 2048  # that a step's costs are rounded to, upwards
_LAST = 8  # rounds at the final budget, at most: they end when nothing changes

Cost = Callable[[np.ndarray], float]


def knapsack(chain: Chain, cost: Cost, budget: float, steps: int = STEPS) -> np.ndarray | None:
    """Choose how many events each group of a pool loses.

    Parameters
    ----------
    chain : Chain
        The groups of the pool, their scores and what they may lose.
    cost : callable
        What a state (int [groups]: events of each group) costs.
    budget : float
        What the state may cost.
    steps : int
        In which the cost is brought down from that of the dense state.

    Returns
    -------
    numpy.ndarray or None
        Int [groups], a state under the budget; None where none was found.
    """
    losses = group_losses(chain)
    state = chain.state(0)
    dense = cost(state)
    best: tuple[float, np.ndarray] | None = None
    for step in range(1, steps + _LAST + 1):
        wanted = budget + (dense - budget) * max(0.0, 1 - step / steps)
        before = state
        state = _step(state, losses, cost, wanted, reach=2.0 / steps)
        if step < steps:
            continue
        if cost(state) <= budget:
            lost = lost_importance(losses, state)
            if best is None or lost < best[0]:
                best = lost, state
        if step > steps and np.array_equal(before, state):
            break
    return None if best is None else best[1]


def lost_importance(losses: list[np.ndarray], state: np.ndarray) -> float:
    """Sum of the scores of the units that a state removes."""
    return float(sum(loss[events] for loss, events in zip(losses, state, strict=True)))


def group_losses(chain: Chain) -> list[np.ndarray]:
    """Float [events + 1] for each group: the importance lost after so many events."""
    losses = []
    for ranking, order, counts in zip(chain.rankings, chain.orders, chain.counts, strict=True):
        lost = np.concatenate([[0.0], np.cumsum(ranking.scores[order], dtype=np.float64)])
        losses.append(lost[counts] - lost[counts[0]])
    return losses


def _step(state: np.ndarray, losses: list[np.ndarray], cost: Cost, wanted: float, reach: float) -> np.ndarray:
    """Return the state near this one that loses least and, with costs taken as a sum, costs at most ``wanted``."""
    now = cost(state)
    options, weights, most = [], [], 0.0
    for group, loss in enumerate(losses):
        choices = _near(int(state[group]), len(loss) - 1, reach)
        saved = np.empty(len(choices))
        for index, choice in enumerate(choices):
            trial = state.copy()
            trial[group] = choice
            saved[index] = now - cost(trial)
        most += float(saved.max())
        options.append(choices)
        weights.append(saved.max() - saved)  # at least 0: what it costs not to save the most
    room = sum(float(weight.max()) for weight in weights)
    capacity = most - (now - wanted)
    if capacity <= 0 and reach < 1:  # a cost may fall in steps that are wider than a look around
        return _step(state, losses, cost, wanted, 2 * reach)
    if capacity <= 0 or room <= 0:  # out of reach: as far as it goes
        return np.array([choice[int(np.argmin(weight))] for choice, weight in zip(options, weights, strict=True)])
    return _solve(options, weights, losses, min(capacity, room))


def _near(position: int, last: int, reach: float) -> np.ndarray:
    """Return numbers of events around a position: some fewer, some more, evenly spread where there are many."""
    radius = max(2, int(np.ceil(reach * last)))
    low, high = max(0, position - radius), min(last, position + radius)
    choices = np.unique(np.linspace(low, high, min(_OPTIONS, high - low + 1)).round().astype(np.int64))
    return np.union1d(choices, [position])


def _solve(
    options: list[np.ndarray], weights: list[np.ndarray], losses: list[np.ndarray], capacity: float
) -> np.ndarray:
    """Return one option of each group: the least loss of those whose weights, rounded up, fit the capacity."""
    bins = [np.ceil(weight / capacity * _BINS - 1e-9).astype(np.int64) for weight in weights]
    best = np.zeros(_BINS + 1)
    chosen = []
    for choices, weight, loss in zip(options, bins, losses, strict=True):
        total, taken = np.full(_BINS + 1, np.inf), np.zeros(_BINS + 1, dtype=np.int64)
        for index, (choice, need) in enumerate(zip(choices, weight, strict=True)):
            if need > _BINS:
                continue
            here = np.full(_BINS + 1, np.inf)
            here[need:] = best[: _BINS + 1 - need] + loss[choice]
            better = here < total
            total[better], taken[better] = here[better], index
        best = total
        chosen.append(taken)
    left = _BINS
    picked = []
    for choices, weight, taken in zip(reversed(options), reversed(bins), reversed(chosen), strict=True):
        index = int(taken[left])
        picked.append(int(choices[index]))
        left -= int(weight[index])
    return np.array(picked[::-1])

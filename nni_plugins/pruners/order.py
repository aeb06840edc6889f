"""Order: units go from the end of a list that is given, as those of a network that was trained to be cut there.

The lists are a supernet's (:mod:`nni_plugins.training.supernet`), in which each width keeps the first units of every
group. Asks nothing of training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugins.pruners.base import GroupPruner
from nni_plugins.pruners.errors import PruningError


class OrderPruner(GroupPruner):
    """Remove the last units of given lists.

    The score of a unit is the share of its group that comes after it, so that under a global budget all groups lose
    the same share, unless the budget says otherwise.

    Parameters
    ----------
    model : torch.nn.Module
        Model to prune.
    config_list : list of dict
        NNI's.
    evaluator : nni Evaluator, optional
        Needed for a schedule of several times only.
    existed_wrappers : dict, optional
        Given by ``from_compressor``.
    order : dict or path
        For each group by name, its units, the most important first; or a JSON file of that.
    **kwargs
        Those of :class:`~nni_plugins.pruners.base.GroupPruner`.
    """

    default_normalise = None

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Any = None,
        existed_wrappers: Any = None,
        *,
        order: Mapping[str, Sequence[int]] | str | Path,
        **kwargs: Any,
    ):
        self.order = _read(order) if isinstance(order, (str, Path)) else dict(order)
        super().__init__(model, config_list, evaluator, existed_wrappers, **kwargs)

    def _scores(self) -> dict[str, Tensor]:
        return {group.name: order_scores(group.name, group.size, self.order) for group in self.groups}


def order_scores(name: str, size: int, order: Mapping[str, Sequence[int]]) -> Tensor:
    """Return the score of each unit of a group: float64 [size], the first unit's is 1."""
    units = order.get(name)
    if units is None:
        raise PruningError(f"order has no list for the group {name}; it is one of another model")
    if sorted(units) != list(range(size)):
        raise PruningError(f"order of {name} must hold each of its {size} units once")
    scores = torch.empty(size, dtype=torch.float64)
    scores[torch.as_tensor(list(units))] = torch.arange(size, 0, -1, dtype=torch.float64) / size
    return scores


def _read(path: str | Path) -> dict[str, list[int]]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PruningError(f"order: {path} cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise PruningError(f"order: {path} must hold a list of units for each group")
    return found
